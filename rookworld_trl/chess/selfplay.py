"""Self-play without a board: the model picks a move by `P:` and works out the next position by `A:`, ply after ply.

Python-chess follows along. In *self-play* a game ends when the model leaves the rules (a move that is illegal, a next
position, a reward or a flag that is wrong, a text that does not parse), when the game is over, or at the limit. How
many plies it lasts measures both tasks together: one fault a hundred plies is rare in a table of accuracies and ends
most games.

In the *closed loop* the game goes on after a fault. The model sees nothing but the position that it last wrote; a move
that is illegal on the true board is replaced there, and in the next `A:` prompt, by a random legal one. How far the
model's board is from the true one, ply by ply, is its drift.
"""

import random
from dataclasses import dataclass, field

import chess

from rookworld_trl.chess import ParseError, environment, policy, task_of
from rookworld_trl.chess.accuracy import Ask
from rookworld_trl.chess.format import squares
from rookworld_trl.chess.play import random_opening
from rookworld_trl.measuring.metrics import Metric, Term, mean, ratio, share
from rookworld_trl.measuring.result import Item, Result
from rookworld_trl.settings.terminal import progress_bar

FAULTLESS = ("game over", "ply limit")
SHOWN_PLIES = (1, 10, 20, 40, 80)  # of the closed loop's table; its items have every ply
COPIER = {"copier": "random move, input copied"}


def _wrong(ply: int) -> Metric:
    def of(name: str) -> Term:
        return lambda scores: scores.get(name, 0.0)

    label = f"squares wrong after ply {ply}"
    return Metric(f"wrong_{ply}", label, of(f"wrong_{ply}"), of(f"reached_{ply}"), False, ".2f", better=-1)


METRICS = [
    mean("legal_plies", "legal plies a game", ".1f"),
    mean("faultless_plies", "faultless plies a game", ".1f"),
    share("faultless", "games without a fault"),
]
DRIFT_METRICS = [
    ratio("wrong", "squares wrong, mean over plies", "plies", ".2f", better=-1),
    ratio("right", "plies with the right board", "plies"),
    ratio("legal", "moves legal on the true board", "plies"),
    ratio("parsed", "answers parsable", "answers"),
    METRICS[1],
    *map(_wrong, SHOWN_PLIES),
]


@dataclass(slots=True)
class _Game:
    """A game on two boards.

    Attributes:
        board: the true one.
        belief: the FEN that the model wrote last.
        end: why the game ended, or its first fault.
        drift: squares that are wrong after each ply.
    """

    board: chess.Board
    belief: str
    rng: random.Random
    end: str = ""
    legal_plies: int = 0
    faultless_plies: int = 0
    legal: int = 0
    parsed: int = 0
    drift: list[int] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    move: str = ""

    def fault(self, reason: str) -> None:
        self.end = self.end or reason


def run_selfplay(
    ask: Ask,
    *,
    games: int = 100,
    max_plies: int = 200,
    opening_plies: int = 2,
    seed: int = 0,
    go_on: bool = False,
    progress: bool = False,
) -> Result:
    """Let the model play games against itself inside its own environment.

    Args:
        games: played side by side.
        max_plies: plies of the model at most; a game that gets there is faultless.
        opening_plies: random legal plies before the model takes over, so that greedy games differ.
        go_on: the closed loop: play on after a fault, and measure drift.

    Returns:
        One item a game. In self-play `legal_plies` counts legal moves, `faultless_plies` those whose outcome was right
        too; the group is the reason why the game ended; prompt and completion are the last ones. In the closed loop
        the group is the first fault, and `wrong_N` says how many squares are wrong after ply N.

    Raises:
        ValueError: no games, or as `ask` does.
    """
    if games < 1 or max_plies < 1:
        raise ValueError(f"games and max_plies must be above 0; got {games} and {max_plies}")
    settings = {"max_plies": max_plies, "opening_plies": opening_plies, "openings_seed": seed}
    name = "closed loop" if go_on else "self-play"
    sides = []
    for player, title in ((ask, name if progress else ""), (copier(seed), "")):
        rng = random.Random(seed)
        openings = [random_opening(rng, opening_plies) for _ in range(games)]
        played = [_Game(board, board.fen(), random.Random(f"{seed} {number}")) for number, board in enumerate(openings)]
        _play(player, played, max_plies, go_on, title)
        sides.append(played)
    items = []
    for number, (game, copied) in enumerate(zip(*sides, strict=True)):
        copies = {f"copier.{key}": value for key, value in _scores(copied, go_on).items()}
        scores = _scores(game, go_on) | copies
        items.append(Item(f"game {number}", scores, game.prompt, game.completion, {"end": game.end}))
    return Result(name, DRIFT_METRICS if go_on else METRICS, items, settings=settings, players=COPIER)


def copier(seed: int = 0) -> Ask:
    """A trivial player: a random legal move of the position that it is shown, and every input copied."""
    rng = random.Random(seed)

    def answer(prompt: str) -> str:
        if task_of(prompt) == "environment":
            copied = environment.EnvironmentOutput(
                environment.parse_prompt(prompt).fen, environment.REWARD_LEGAL, False, False
            )
            return environment.format_completion(copied)
        moves = sorted(move.uci() for move in chess.Board(policy.parse_prompt(prompt)).legal_moves)
        move = rng.choice(moves or ["a1a2"])
        return policy.format_completion([move], ["0.0"], move)

    return lambda prompts, title: list(map(answer, prompts))


def _play(ask: Ask, games: list[_Game], max_plies: int, go_on: bool, title: str) -> None:
    over: set[int] = set()
    with progress_bar(title, max_plies, "ply") as bar:
        for _ in range(max_plies):
            running = [game for game in games if id(game) not in over]
            if not running:
                break
            bar.set_postfix(games=len(running), refresh=False)
            _choose(ask, running)
            _advance(ask, [game for game in running if go_on or not game.end])
            for game in running:
                if game.board.is_game_over() or (game.end and not go_on):
                    over.add(id(game))
                    game.fault("game over")
            bar.update()
    for game in games:
        game.fault("ply limit")


def _choose(ask: Ask, games: list[_Game]) -> None:
    """Choose each game's next move by `P:`."""
    prompts = [policy.prompt(game.belief) for game in games]
    for game, prompt, completion in zip(games, prompts, ask(prompts, ""), strict=True):
        if not game.end:
            game.prompt, game.completion = prompt, completion
        moves = sorted(move.uci() for move in game.board.legal_moves)
        try:
            game.move = policy.parse(completion).best
            game.parsed += 1
        except ParseError:
            game.fault("unparsable P:")
            game.move = ""
        if game.move in moves:
            game.legal += 1
            game.legal_plies += not game.end
        else:
            game.fault("illegal move")
            game.move = game.rng.choice(moves)


def _advance(ask: Ask, games: list[_Game]) -> None:
    """Work out each game's next position by `A:`, and play the move on the true board."""
    histories = [[move.uci() for move in game.board.move_stack] for game in games]
    prompts = [
        environment.prompt(game.belief, game.move, history) for game, history in zip(games, histories, strict=True)
    ]
    for game, prompt, completion in zip(games, prompts, ask(prompts, ""), strict=True):
        if not game.end:
            game.prompt, game.completion = prompt, completion
        right = environment.transition(game.board.fen(), game.move)
        try:
            written = environment.parse(completion)
            game.parsed += 1
            game.belief = written.fen
            if written != right:
                game.fault("wrong position" if written.fen != right.fen else "wrong reward or flag")
        except ParseError:
            game.fault("unparsable A:")
        game.faultless_plies += not game.end
        game.board.push_uci(game.move)
        game.drift.append(wrong_squares(game.belief, game.board))


def wrong_squares(fen: str, board: chess.Board) -> int:
    """How many of the 64 squares a FEN has other than the board."""
    pairs = zip(squares(fen.split(" ")[0]) or "", squares(board.board_fen()) or "", strict=True)
    return sum(one != two for one, two in pairs)


def _scores(game: _Game, drift: bool) -> dict[str, float]:
    scores = {
        "legal_plies": float(game.legal_plies),
        "faultless_plies": float(game.faultless_plies),
        "faultless": float(game.end in FAULTLESS),
    }
    if not drift:
        return scores
    plies = len(game.drift)
    scores |= {"plies": float(plies), "answers": 2.0 * plies, "parsed": float(game.parsed), "legal": float(game.legal)}
    scores |= {"wrong": float(sum(game.drift)), "right": float(game.drift.count(0))}
    for ply, wrong in enumerate(game.drift, start=1):
        scores |= {f"wrong_{ply}": float(wrong)}
    return scores | {f"reached_{ply}": 1.0 for ply in SHOWN_PLIES if ply <= plies}
