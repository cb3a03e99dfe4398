"""Prompts from a user's own games: each move of a PGN file gives an `A:` row and, with an engine, a `P:` row.

python-chess reads the games, each up to its first null, illegal or unreadable move. Two things are decided here.
It ends a game at an empty line alone, so that in files without them moves come from positions that were never on the
board: here a tag behind moves begins a game. And it passes over letters that it does not know, so that the German
`2. Sf3 Sc6` becomes `2. f3 c6`: games with other piece letters than K Q R B N are left out.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import chess
import chess.pgn

from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.dataset import Report, row_of
from rookworld_trl.chess.strata import phase, stratum

_TAG = re.compile(r'\[\w+\s+"')
_REMARK = re.compile(r"\{[^}]*\}|;.*|^\[.*$", re.MULTILINE)
_FOREIGN = re.compile(r"(?<!\w)[A-Z\u0370-\u04ff♔-♟](?<![KQRBNP])[a-h]?[1-8]?[x:-]?[a-h][1-8](?![a-z])")


class _MainLine(chess.pgn.GameBuilder[chess.pgn.Game]):
    """A game without its variations, up to the first error, which is kept and not logged."""

    def begin_variation(self) -> chess.pgn.SkipType:  # type: ignore[override]
        return chess.pgn.SKIP

    def end_variation(self) -> None:
        pass

    def visit_move(self, board: chess.Board, move: chess.Move) -> None:
        if not self.game.errors:  # a bracket behind the error would lead back to the main line
            super().visit_move(board, move)

    def handle_error(self, error: Exception) -> None:
        self.game.errors.append(error)


def rows_of_games(path: Path, report: Report, positions: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the shipped data, main lines only; a pair of position and move comes once.

    Args:
        path: a PGN file, any number of games.
        report: filled on the way.
        positions: also a `P:` row for each position, without values: `rookworld_trl.chess.sources` fills them in.
    """
    seen: set[str] = set()
    moves: set[tuple[str, str]] = set()
    for number, text in enumerate(_games(_lines(path)), 1):
        report.count("games")
        board, history = chess.Board(), list[str]()
        for move in _moves(text, board, number, report):
            fen, key, uci = board.fen(), position_key(board.fen()), move.uci()
            if positions and key not in seen:
                report.count("P: rows")
                yield row_of("policy", policy.prompt(fen), "", phase(board), game=str(number))
            seen.add(key)
            if (key, uci) in moves:
                report.count("moves from positions seen before")
            else:
                moves.add((key, uci))
                report.count("A: rows")
                target = environment.format_completion(environment.transition(fen, uci))
                prompt = environment.prompt(fen, uci, history)
                yield row_of("environment", prompt, target, stratum(board, uci), game=str(number))
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
                try:
                    yield line.decode("utf-8-sig")
                except UnicodeDecodeError:
                    yield line.decode("latin-1")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as pgn ({error}). Write it again") from error


def _games(lines: Iterable[str]) -> Iterator[str]:
    """The text of each game."""
    found: list[str] = []
    tagged = moved = False
    for line in lines:
        tag, empty = _TAG.match(line) is not None, line.isspace()
        if found and (line.startswith("[Event ") or (moved and (tag or (empty and not tagged)))):
            yield "".join(found)
            found, tagged, moved = [], False, False
        if found or not empty:
            found.append(line)
            tagged, moved = tagged or tag, moved or not (tag or empty)
    if found:
        yield "".join(found)


def _moves(text: str, board: chess.Board, number: int, report: Report) -> list[chess.Move]:
    """The moves of a main line up to the first that cannot be played, and `board` as they begin; none, counted, of a
    game that cannot be used."""
    game = chess.pgn.read_game(io.StringIO(text), Visitor=_MainLine)
    start = _start(game.headers) if game is not None else None
    moves = list(game.mainline_moves()) if game is not None else []
    nulls = [place for place, move in enumerate(moves) if not move]
    moves = moves[: nulls[0]] if nulls else moves
    if start is None:
        report.count("games skipped: they do not begin from a legal position of standard chess")
    elif _FOREIGN.search(_REMARK.sub("", text)):
        report.count("games skipped: other piece letters than K Q R B N")
    elif not moves:
        report.count("games skipped: no move can be read")
    else:
        if errors := [*(["a null move"] if nulls else []), *map(str, game.errors if game is not None else ())]:
            what = "games used up to their first null, illegal or unreadable move"
            report.count(what, f"game {number}, {errors[0]}")
        board.set_fen(start.fen())
        return moves
    return []


def _start(headers: chess.pgn.Headers) -> chess.Board | None:
    """The board that a game starts from; None where that is no legal position of standard chess."""
    try:
        board = headers.board() if headers.variant() is chess.Board else None
    except ValueError:  # no position, or a variant that python-chess does not know
        return None
    return None if board is None or board.chess960 or not board.is_valid() else board
