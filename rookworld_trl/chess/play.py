"""Who can play, where games begin, and games, many side by side, so that a model decodes one batch per ply.

A model, an engine, a random mover, a greedy capturer: each has one method, for many boards at a time. Openings are some
random plies from the start.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, cast

import chess
import chess.pgn
from transformers import PreTrainedModel

from rookworld_trl.chess import policy
from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.strata import material_won
from rookworld_trl.modeling.completions import completion_texts
from rookworld_trl.modeling.rollout import rollout


class Choice(NamedTuple):
    """A player's move.

    Attributes:
        move: UCI. An illegal one loses the game. None says that the player could not be asked, through no fault of its
            chess (an engine that died twice); that voids the game.
        origin: `own`; or, in place of an own move that was illegal, `candidates` (the first legal one of the model's
            list, its highest eval first) or `random`.
        answer: the model's first answer; None where it does not parse, and for other players.
    """

    move: str | None
    origin: Literal["own", "candidates", "random"] = "own"
    answer: policy.PolicyOutput | None = None


class Player(Protocol):
    """Chooses moves."""

    name: str

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        """The move for each board. Boards are not changed, and none of them is a finished game."""
        ...


class RandomPlayer:
    """Plays any legal move, all equally likely."""

    name = "random"

    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return [Choice(self._rng.choice(self._moves(board)).uci()) for board in boards]

    def _moves(self, board: chess.Board) -> list[chess.Move]:
        return list(board.legal_moves)


class GreedyCapturePlayer(RandomPlayer):
    """Plays the move that wins most material in one ply, promotions included; any of them where several do."""

    name = "greedy capture"

    def _moves(self, board: chess.Board) -> list[chess.Move]:
        won = {move: material_won(board, move) for move in board.legal_moves}
        return [move for move in won if won[move] == max(won.values())]


class EnginePlayer:
    """Plays an engine's move. How strong it is, the engine's nodes decide.

    Args:
        engine: running, that is inside its `with` block; it may serve several players.
        random_share: how many of its moves are random ones instead: a player between two kinds.
    """

    def __init__(self, engine: Engine, name: str = "stockfish", random_share: float = 0.0, seed: int = 0):
        self.name, self.engine = name, engine
        self._random_share = random_share
        self._rng = random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return [
            Choice(self._rng.choice(list(board.legal_moves)).uci())
            if self._rng.random() < self._random_share
            else Choice(self.engine.play(board))
            for board in boards
        ]


class ModelPlayer:
    """Plays a model's `P:` completion, and never an illegal move: where its own is one, it falls back (see `Choice`).

    Args:
        model: transformers `GPT2LMHeadModel`.
        temperature: 0 for greedy, which plays equal positions equally.
        max_new_tokens: at most; less where the prompt leaves less of the model's context.
        seed: seeds the samples; a random fallback follows from it and the position.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 80,
        batch_size: int = 64,
        seed: int = 0,
        name: str = "model",
    ):
        self.name = name
        self._model, self._tokenizer = model, tokenizer
        self._temperature, self._max_new_tokens, self._batch_size = temperature, max_new_tokens, batch_size
        self._seed, self._rng = seed, random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return list(map(self._choice, boards, self._answers(boards)))

    def _choice(self, board: chess.Board, answer: policy.PolicyOutput | None) -> Choice:
        legal = {move.uci() for move in board.legal_moves}
        if answer is not None and answer.best in legal:
            return Choice(answer.best, "own", answer)
        evals = zip(answer.moves, answer.evals, strict=False) if answer is not None else ()
        for move, _ in sorted(evals, key=lambda pair: -pair[1]):  # equal ones as they were listed
            if move in legal:
                return Choice(move, "candidates", answer)
        return Choice(random.Random(f"{self._seed} {board.fen()}").choice(sorted(legal)), "random", answer)

    def _answers(self, boards: Sequence[chess.Board]) -> list[policy.PolicyOutput | None]:
        """The whole answer for each board; None where the completion does not parse."""
        prompt_ids = self._tokenizer([policy.prompt(board.fen()) for board in boards])["input_ids"]
        room = self._model.config.n_positions - max(map(len, prompt_ids))
        sampled = rollout(
            self._model,
            prompt_ids,
            max_new_tokens=min(self._max_new_tokens, max(room, 1)),
            eos_token_id=self._tokenizer.eos_token_id,
            temperature=self._temperature,
            seed=self._rng.getrandbits(31),  # a new one each time: a position met again gets another sample
            batch_size=self._batch_size,
        )
        return [policy.read(text) for text in completion_texts(self._tokenizer, sampled.completion_ids)]


# Openings


def random_openings(count: int, seed: int = 0, plies: int = 4) -> list[str]:
    """FENs of positions that many random legal plies from the start; none is a finished game."""
    rng, found = random.Random(seed), list[str]()
    while len(found) < count:
        board = chess.Board()
        for _ in range(plies):
            if moves := list(board.legal_moves):
                board.push(rng.choice(moves))
        if not board.is_game_over():
            found.append(board.fen())
    return found


# Games

Outcome = Literal["1-0", "0-1", "1/2-1/2", "*"]
Game = tuple[Player, Player, str]  # White, Black, and the FEN of the position they begin from

_LIMIT: tuple[Outcome, str] = ("1/2-1/2", "ply limit")


@dataclass(frozen=True, slots=True)
class GameRecord:
    """A game as it was played.

    Attributes:
        fen: where it started.
        moves: the legal moves played, in UCI.
        result: as in PGN; `*` for a game that is void.
        reason: `checkmate`, `stalemate`, `insufficient material`, `50 moves`, `threefold repetition`, `illegal move`,
            `ply limit` or `no answer`.
        white: the player's name.
        black: the player's name.
        first_illegal: the number in `moves` of the first one that stands for an illegal move; None without one.
    """

    fen: str
    moves: tuple[str, ...]
    result: Outcome
    reason: str
    white: str
    black: str
    first_illegal: int | None = None

    @property
    def white_score(self) -> float | None:
        """1 for a win, 0.5 for a draw, 0 for a loss of White; None for a void game."""
        return {"1-0": 1.0, "1/2-1/2": 0.5, "0-1": 0.0}.get(self.result)

    @property
    def strict(self) -> "GameRecord":
        """The same game if the first illegal move loses, whatever was played in its place."""
        if self.first_illegal is None:
            return self
        moves = self.moves[: self.first_illegal]
        whites_turn = chess.Board(self.fen).turn == (len(moves) % 2 == 0)
        result: Outcome = "0-1" if whites_turn else "1-0"
        return replace(self, moves=moves, result=result, reason="illegal move", first_illegal=None)

    def pgn(self, event: str, round: str) -> str:
        """The game in PGN's export format. Comments say where the first illegal move was, and how the game ended."""
        board = chess.Board(self.fen)
        for move in self.moves:
            board.push_uci(move)
        game = chess.pgn.Game.from_board(board)
        tags = {"Event": event, "Round": round, "White": self.white, "Black": self.black, "Result": self.result}
        game.headers.update(tags)
        for number, node in enumerate(game.mainline()):
            if number == self.first_illegal:
                node.comment = "in place of an illegal move, the game's first"
        game.end().comment = " ".join(filter(None, (game.end().comment, self.reason)))
        return str(game) + "\n"


def mirrored(first: Player, second: Player, fens: Sequence[str]) -> list[Game]:
    """Two games from each position, with colours swapped."""
    return [game for fen in fens for game in ((first, second, fen), (second, first, fen))]


def play_games(
    games: Sequence[Game], max_plies: int = 400, ended: Callable[[int], object] = lambda number: None
) -> list[GameRecord]:
    """Play games, all of them side by side: each player is asked once a ply for all its boards.

    An illegal move loses. Draws that a player may claim (50 moves, threefold repetition) are claimed at once; a game
    that reaches `max_plies` is a draw.

    Args:
        ended: told after each ply how many games have ended with it.

    Raises:
        ParseError: a starting position is malformed or illegal.
    """
    boards = [board_from_fen(fen) for _, _, fen in games]
    ends: list[tuple[Outcome, str] | None] = [_end(board) for board in boards]
    illegal: list[int | None] = [None] * len(games)
    while running := [i for i, end in enumerate(ends) if end is None]:
        asked: dict[int, list[int]] = {}
        for i in running:
            asked.setdefault(id(_mover(games[i], boards[i])), []).append(i)
        for numbers in asked.values():
            player = _mover(games[numbers[0]], boards[numbers[0]])
            for i, choice in zip(numbers, player.choose([boards[i] for i in numbers]), strict=True):
                ply = len(boards[i].move_stack)
                illegal[i] = ply if choice.origin != "own" and illegal[i] is None else illegal[i]
                ends[i] = _play(boards[i], choice.move, max_plies)
        ended(sum(ends[i] is not None for i in running))
    return [
        GameRecord(fen, tuple(move.uci() for move in board.move_stack), *end, white.name, black.name, first)
        for (white, black, fen), board, end, first in zip(games, boards, ends, illegal, strict=True)
        if end is not None
    ]


def _mover(game: Game, board: chess.Board) -> Player:
    return game[0] if board.turn == chess.WHITE else game[1]


def _play(board: chess.Board, answer: str | None, max_plies: int) -> tuple[Outcome, str] | None:
    """Play an answer on the board; the result and its reason when that ends the game."""
    if answer is None:
        return "*", "no answer"
    move = next((legal for legal in board.legal_moves if legal.uci() == answer), None)
    if move is None:
        return ("0-1" if board.turn == chess.WHITE else "1-0"), "illegal move"
    board.push(move)
    end = _end(board)
    return end or (_LIMIT if len(board.move_stack) >= max_plies else None)


def _end(board: chess.Board) -> tuple[Outcome, str] | None:
    if (outcome := board.outcome()) is not None:
        return cast(Outcome, outcome.result()), outcome.termination.name.lower().replace("_", " ")
    if board.is_fifty_moves():
        return "1/2-1/2", "50 moves"
    return ("1/2-1/2", "threefold repetition") if board.is_repetition(3) else None
