"""Prompts from a user's own games: each move of a PGN file gives an `A:` row and, with an engine, a `P:` row.

Where a game begins and ends is decided here: python-chess ends one at every empty line and at nothing else, so that
chess.com's exports, which have none between games, give moves from positions that were never on the board.
"""

import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chess
import chess.pgn

from rookworld_trl.data.strata import phase, stratum
from rookworld_trl.tasks import environment, policy, position_key

_TAG = re.compile(r'\[[A-Za-z0-9_]+\s+"')
_FIRST_MOVE = re.compile(r"\s*1\s*\.(?!\s*\.)")
_RESULT = re.compile(r"(1-0|0-1|1/2-1/2|\*)\s*$")


@dataclass
class GamesReport:
    """What became of the games: how many were read and how many rows they gave; `skipped` by reason; how many were
    `cut` short, with the first reason."""

    games: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    first_cut: str = ""
    repeated: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.games} games: {self.kept['policy']} P: and {self.kept['environment']} A: rows; "
            f"{self.repeated} moves from positions seen before",
            *(f"skipped {count} games: {reason}" for reason, count in self.skipped.most_common()),
        ]
        if self.cut:
            lines.append(
                f"{self.cut} games are used up to their first null, illegal or unreadable move "
                f"(first: {self.first_cut})"
            )
        return "\n".join(lines)


def rows_of_games(path: Path, report: GamesReport, positions: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the shipped data, main lines only; a pair of position and move comes once.

    Args:
        path: a PGN file, any number of games.
        report: filled on the way.
        positions: also a `P:` row for each position, without values: `rookworld_trl.data.values` fills them in.
    """
    seen: set[str] = set()
    moves: set[tuple[str, str]] = set()
    for text in _games(_lines(path)):
        game = chess.pgn.read_game(io.StringIO(text), Visitor=_MainLine)
        if game is None:
            continue
        report.games += 1
        board = _start(game, report)
        if board is None:
            continue
        if game.error:
            report.cut += 1
            report.first_cut = report.first_cut or f"game {report.games}, {game.error}"
        history: list[str] = []
        for move in game.moves:
            fen, key, uci = board.fen(), position_key(board.fen()), move.uci()
            if positions and key not in seen:
                report.kept["policy"] += 1
                yield _policy_row(board) | {"game": str(report.games)}
            seen.add(key)
            if (key, uci) in moves:
                report.repeated += 1
            else:
                moves.add((key, uci))
                report.kept["environment"] += 1
                yield {
                    "prompt": environment.prompt(fen, uci, history),
                    "task": "environment",
                    "target": environment.format_completion(environment.transition(fen, uci)),
                    "legal_moves": [],
                    "legal_cp": [],
                    "stratum": stratum(board, uci),
                    "game": str(report.games),
                }
            history.append(uci)
            board.push(move)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, gzipped or not.

    Raises:
        ValueError: it holds no text.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise ValueError(f"{path} line {number}: is no text, so this is no PGN file. Export it again")
                yield line.decode("utf-8-sig", errors="replace")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as pgn ({error}). Write it again") from error


def _games(lines: Iterable[str]) -> Iterator[str]:
    """The text of each game, its tags and its moves apart by the one empty line that python-chess asks for.

    A game ends before the next one's tags, and before a line with a first move where an empty line or a result stands
    in between. What stands in braces is a comment, unless it is the tag `Event` at the beginning of a line: that
    comment was never closed.
    """
    tags: list[str] = []
    moves: list[str] = []
    inside = ended = False  # a comment in braces; a line after which a game may end
    for line in lines:
        forgotten = inside and line.startswith('[Event "')
        if inside and not forgotten:
            moves.append(line)
            inside = _ends_inside(line, inside=True)
        elif _TAG.match(line):
            if moves or (line.startswith("[Event ") and tags):
                yield _game(tags, moves, forgotten)
                tags, moves, inside = [], [], False
            tags.append(line)
        elif line.isspace():
            ended = True
        elif not line.startswith("%"):
            if moves and ended and _FIRST_MOVE.match(line):
                yield _game(tags, moves)
                tags, moves = [], []
            moves.append(line)
            inside = _ends_inside(line)
            ended = not inside and _RESULT.search(line) is not None
    if tags or moves:
        yield _game(tags, moves, inside)


def _game(tags: list[str], moves: list[str], open_comment: bool = False) -> str:
    return "".join([*tags, "\n", *moves, "}" if open_comment else "", "\n"])


def _ends_inside(line: str, inside: bool = False) -> bool:
    """Whether a comment in braces goes on in the next line; `inside`: it has gone on in this one."""
    while True:
        if inside:
            _, closed, line = line.partition("}")
            if not closed:
                return True
        before, opened, line = line.partition("{")
        if not opened or ";" in before:  # from a semicolon on the rest of the line is a comment
            return False
        inside = True


class _MainLine(chess.pgn.BaseVisitor["_MainLine"]):
    """The tags of a game, and its moves up to the first that is null, illegal or unreadable, whose `error` is kept.

    Not python-chess's game: that one logs each error, and after one it goes on behind the next bracket, with moves
    from a position in which they were not played.
    """

    def __init__(self) -> None:
        self.headers = chess.pgn.Headers({})
        self.moves: list[chess.Move] = []
        self.error = ""
        self._in_variation = False

    def visit_header(self, tagname: str, tagvalue: str) -> None:
        self.headers[tagname] = tagvalue

    def begin_variation(self) -> chess.pgn.SkipType:
        self._in_variation = True  # those within it are skipped with it
        return chess.pgn.SKIP

    def end_variation(self) -> None:
        self._in_variation = False

    def begin_parse_san(self, board: chess.Board, san: str) -> chess.pgn.SkipType | None:
        return chess.pgn.SKIP if self.error else None

    def visit_move(self, board: chess.Board, move: chess.Move) -> None:
        if move:
            self.moves.append(move)
        else:  # as annotators write it, none of chess
            self.error = "a null move"

    def handle_error(self, error: Exception) -> None:
        self.error = self.error or str(error)

    def result(self) -> "_MainLine":
        if self._in_variation:
            self.error = self.error or "a variation that never ends"
        return self


def _start(game: _MainLine, report: GamesReport) -> chess.Board | None:
    """The board that a game starts from; None, counted, for a game that is not of standard chess or has no moves."""
    try:
        standard = game.headers.variant() is chess.Board
    except ValueError:  # a name that python-chess does not know
        standard = False
    try:
        board = game.headers.board() if standard else None
    except ValueError:
        report.skipped["unreadable start position"] += 1
        return None
    if board is None or board.chess960:
        report.skipped["a chess variant"] += 1
        return None
    if not board.is_valid():
        report.skipped["illegal start position"] += 1
        return None
    if not game.moves:
        report.skipped["no moves"] += 1
        return None
    return board


def _policy_row(board: chess.Board) -> dict[str, Any]:
    return {
        "prompt": policy.prompt(board.fen()),
        "task": "policy",
        "target": "",
        "legal_moves": [],
        "legal_cp": [],
        "stratum": phase(board),
    }
