"""Self-play without a board: the model picks a move by `P:` and works out the next position by `A:`, ply after ply.

Python-chess follows along. A game ends when the model leaves the rules (a move that is illegal, a next position, a
reward or a flag that is wrong, a text that does not parse), when the game is over, or at the limit. How many plies it
lasts measures both tasks together: one fault a hundred plies is rare in a table of accuracies and ends most games.
"""

import random
from dataclasses import dataclass

import chess

from rookworld_trl.chess import ParseError, environment, policy, task_of
from rookworld_trl.chess.accuracy import Ask
from rookworld_trl.chess.play import random_opening
from rookworld_trl.measuring.metrics import mean, share
from rookworld_trl.measuring.result import Item, Result
from rookworld_trl.settings.terminal import progress_bar

FAULTLESS = ("game over", "ply limit")
COPIER = {"copier": "random move, input copied"}
METRICS = [
    mean("legal_plies", "legal plies a game", ".1f"),
    mean("faultless_plies", "faultless plies a game", ".1f"),
    share("faultless", "games without a fault"),
]


@dataclass(slots=True)
class _Game:
    """A game; `end` says why it ended."""

    board: chess.Board
    end: str = ""
    legal_plies: int = 0
    faultless_plies: int = 0
    prompt: str = ""
    completion: str = ""
    move: str = ""

    def scores(self) -> dict[str, float]:
        faultless = float(self.end in FAULTLESS)
        plies = {"legal_plies": float(self.legal_plies), "faultless_plies": float(self.faultless_plies)}
        return plies | {"faultless": faultless}


def run_selfplay(
    ask: Ask,
    *,
    games: int = 100,
    max_plies: int = 200,
    opening_plies: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """Let the model play games against itself inside its own environment.

    Args:
        games: played side by side.
        max_plies: plies of the model at most; a game that gets there is faultless.
        opening_plies: random legal plies before the model takes over, so that greedy games differ.

    Returns:
        One item a game: `legal_plies` counts legal moves, `faultless_plies` those whose outcome was right too; the
        group is the reason why the game ended; prompt and completion are the last ones.

    Raises:
        ValueError: no games, or as `ask` does.
    """
    if games < 1 or max_plies < 1:
        raise ValueError(f"games and max_plies must be above 0; got {games} and {max_plies}")
    settings = {"max_plies": max_plies, "opening_plies": opening_plies, "openings_seed": seed}
    sides = []
    for player, title in ((ask, "self-play" if progress else ""), (copier(seed), "")):
        rng = random.Random(seed)
        played = [_Game(random_opening(rng, opening_plies)) for _ in range(games)]
        _play(player, played, max_plies, title)
        sides.append(played)
    items = []
    for number, (game, copied) in enumerate(zip(*sides, strict=True)):
        scores = game.scores() | {f"copier.{key}": value for key, value in copied.scores().items()}
        items.append(Item(f"game {number}", scores, game.prompt, game.completion, {"end": game.end}))
    return Result("self-play", METRICS, items, settings=settings, players=COPIER)


def copier(seed: int = 0) -> Ask:
    """A trivial player: a random legal move of the position that it is shown, and every input copied."""
    rng = random.Random(seed)

    def answer(prompt: str) -> str:
        if task_of(prompt) == "environment":
            copied = environment.EnvironmentOutput(
                environment.parse_prompt(prompt).fen, environment.REWARD_LEGAL, False, False
            )
            return environment.format_completion(copied)
        move = rng.choice(sorted(move.uci() for move in chess.Board(policy.parse_prompt(prompt)).legal_moves))
        return policy.format_completion([move], ["0.0"], move)

    return lambda prompts, title: list(map(answer, prompts))


def _play(ask: Ask, games: list[_Game], max_plies: int, title: str) -> None:
    with progress_bar(title, max_plies, "ply") as bar:
        for _ in range(max_plies):
            running = [game for game in games if not game.end]
            if not running:
                break
            bar.set_postfix(games=len(running), refresh=False)
            _choose(ask, running)
            _advance(ask, [game for game in running if not game.end])
            for game in running:
                if not game.end and game.board.is_game_over():
                    game.end = "game over"
            bar.update()
    for game in games:
        game.end = game.end or "ply limit"


def _choose(ask: Ask, games: list[_Game]) -> None:
    """Choose each game's next move by `P:`."""
    prompts = [policy.prompt(game.board.fen()) for game in games]
    for game, prompt, completion in zip(games, prompts, ask(prompts, ""), strict=True):
        game.prompt, game.completion = prompt, completion
        answer = policy.read(game.completion)
        if answer is None:
            game.end = "unparsable P:"
        elif answer.best not in {move.uci() for move in game.board.legal_moves}:
            game.end = "illegal move"
        else:
            game.move = answer.best
            game.legal_plies += 1


def _advance(ask: Ask, games: list[_Game]) -> None:
    """Work out each game's next position by `A:`, and play the move."""
    prompts = [
        environment.prompt(game.board.fen(), game.move, [move.uci() for move in game.board.move_stack])
        for game in games
    ]
    for game, prompt, completion in zip(games, prompts, ask(prompts, ""), strict=True):
        game.prompt, game.completion = prompt, completion
        right = environment.transition(game.board.fen(), game.move)
        try:
            written = environment.parse(game.completion)
            if written != right:
                game.end = "wrong position" if written.fen != right.fen else "wrong reward or flag"
        except ParseError:
            game.end = "unparsable A:"
        game.faultless_plies += not game.end
        game.board.push_uci(game.move)
