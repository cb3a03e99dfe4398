"""Games between players, many side by side, so that a model decodes one batch per ply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import chess
import chess.pgn

from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.players import Player

Result = Literal["1-0", "0-1", "1/2-1/2", "*"]
Game = tuple[Player, Player, str]  # White, Black, and the FEN of the position they begin from

# What PGN's tag `Termination` says of a `GameRecord.reason`; the others are `normal`.
_TERMINATIONS = {"illegal move": "rules infraction", "ply limit": "adjudication", "no answer": "abandoned"}
_LIMIT: tuple[Result, str] = ("1/2-1/2", "ply limit")


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
        first_fallback: the number in `moves` of the first one that stands for an illegal move; None without one.
        first_illegal: likewise, also where the illegal move was sampled again and a legal one came of that.
    """

    fen: str
    moves: tuple[str, ...]
    result: Result
    reason: str
    white: str
    black: str
    first_fallback: int | None = None
    first_illegal: int | None = None

    @property
    def white_score(self) -> float | None:
        """1 for a win, 0.5 for a draw, 0 for a loss of White; None for a void game."""
        return {"1-0": 1.0, "1/2-1/2": 0.5, "0-1": 0.0}.get(self.result)

    @property
    def strict(self) -> "GameRecord":
        """The same game if the first illegal move loses, whatever was played in its place."""
        return self.lost_at(self.first_illegal)

    def lost_at(self, number: int | None) -> "GameRecord":
        """The same game cut at a move's number, and lost there by an illegal move; None for the game as it is."""
        if number is None:
            return self
        moves = self.moves[:number]
        whites_turn = chess.Board(self.fen).turn == (len(moves) % 2 == 0)
        result: Result = "0-1" if whites_turn else "1-0"
        cut = replace(self, moves=moves, result=result, reason="illegal move")
        return replace(cut, first_fallback=None, first_illegal=None)

    def pgn(self, event: str, round: str) -> str:
        """The game in PGN's export format. Comments say where the first illegal move was, and how the game ended."""
        board = chess.Board(self.fen)
        for move in self.moves:
            board.push_uci(move)
        game = chess.pgn.Game.from_board(board)
        tags = {"Event": event, "Round": round, "White": self.white, "Black": self.black, "Result": self.result}
        game.headers.update(tags | {"Termination": _TERMINATIONS.get(self.reason, "normal")})
        for number, node in enumerate(game.mainline()):
            if number == self.first_illegal:
                node.comment = "in place of an illegal move, the game's first"
                node.comment += "" if number == self.first_fallback else ", and sampled again"
            elif number == self.first_fallback:
                node.comment = "in place of an illegal move, the first that sampling again did not mend"
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
        ValueError: `max_plies` is below 1.
    """
    if max_plies < 1:
        raise ValueError(f"max_plies is {max_plies}; give at least 1")
    boards = [board_from_fen(fen) for _, _, fen in games]
    ends: list[tuple[Result, str] | None] = [_end(board) for board in boards]
    fallbacks: list[int | None] = [None] * len(games)
    illegal: list[int | None] = [None] * len(games)
    while running := [i for i, end in enumerate(ends) if end is None]:
        asked: dict[int, list[int]] = {}
        for i in running:
            asked.setdefault(id(_mover(games[i], boards[i])), []).append(i)
        for numbers in asked.values():
            player = _mover(games[numbers[0]], boards[numbers[0]])
            for i, choice in zip(numbers, player.choose([boards[i] for i in numbers]), strict=True):
                ply = len(boards[i].move_stack)
                fallbacks[i] = ply if choice.is_fallback and fallbacks[i] is None else fallbacks[i]
                illegal[i] = ply if choice.origin != "own" and illegal[i] is None else illegal[i]
                ends[i] = _play(boards[i], choice.move, max_plies)
        ended(sum(ends[i] is not None for i in running))
    return [
        GameRecord(fen, tuple(move.uci() for move in board.move_stack), *end, white.name, black.name, *firsts)
        for (white, black, fen), board, end, *firsts in zip(games, boards, ends, fallbacks, illegal, strict=True)
        if end is not None
    ]


def _mover(game: Game, board: chess.Board) -> Player:
    return game[0] if board.turn == chess.WHITE else game[1]


def _play(board: chess.Board, answer: str | None, max_plies: int) -> tuple[Result, str] | None:
    """Play an answer on the board; the result and its reason when that ends the game."""
    if answer is None:
        return "*", "no answer"
    move = next((legal for legal in board.legal_moves if legal.uci() == answer), None)
    if move is None:
        return ("0-1" if board.turn == chess.WHITE else "1-0"), "illegal move"
    board.push(move)
    end = _end(board)
    return end or (_LIMIT if len(board.move_stack) >= max_plies else None)


def _end(board: chess.Board) -> tuple[Result, str] | None:
    if board.is_checkmate():
        return ("0-1" if board.turn == chess.WHITE else "1-0"), "checkmate"
    if board.is_stalemate():
        return "1/2-1/2", "stalemate"
    if board.is_insufficient_material():
        return "1/2-1/2", "insufficient material"
    if board.is_fifty_moves():
        return "1/2-1/2", "50 moves"
    return ("1/2-1/2", "threefold repetition") if board.is_repetition(3) else None
