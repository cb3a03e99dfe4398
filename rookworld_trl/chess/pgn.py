"""Prompts from a user's own games: each move of a PGN file gives an `A:` row and, with an engine, a `P:` row.

Where a game begins and ends, and what of its text is a move, is decided here. python-chess ends a game at every empty
line and at nothing else, so that chess.com's exports, which have none between games, give moves from positions that
were never on the board; and it passes over what it cannot read, so that the German `2. Sf3 Sc6` becomes `2. f3 c6`.
Here every word of a main line is a move, or the game ends before it.
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chess
import chess.pgn

from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.dataset import row_of
from rookworld_trl.chess.strata import phase, stratum

_TAG = re.compile(r'\[[A-Za-z0-9_]+\s+"')
_TAGS = re.compile(r'\[([A-Za-z0-9_]+)\s+"(.*?)"\s*\]')
_FIRST_MOVE = re.compile(r"\s*1\s*\.(?!\s*\.)")
_RESULT = re.compile(r"(1-0|0-1|1/2-1/2|\*)\s*$")

# What moves are written with; remarks and glyphs by number first. A result is a word of its own.
_TOKEN = re.compile(
    r"""\{[^}]*\}? | ;[^\n]* | \$\d+
    | (?P<bracket>[()])
    | (?P<result>(?:1-0|0-1|1/2(?:-1/2)?|½-½|\*)(?![^\s{};()$]))
    | (?P<first>1\s*\.(?![\s]*[.…]))
    | (?P<number>\d+(?:\s*[.…]+|(?=\s|$)))
    | (?P<word>[^\s{};()$]+)""",
    re.VERBOSE,
)
_LETTER = "[A-ZА-ЯΑ-Ω]"  # of a piece in some language
_MOVE = re.compile(rf"({_LETTER})?[a-h]?[1-8]?[x-]?[a-h][1-8](?:=?({_LETTER}|[qrbn]))?(?:e\.?p)?")
_MARKS = re.compile(r"[\W_]+$")  # behind a move: `+`, `#`, `!?`, `±`
_CASTLING = re.compile("[O0](?:-[O0]){1,2}")
_NULL_MOVES = ("--", "Z0", "0000", "@@@@", "null", "pass")  # as annotators write them, none of chess
_REMARKS = ("N", "D", "e.p", "ep")  # a novelty, a diagram, en passant
# Other signs for the same: figurines, which are of no language, dashes, captures.
_PLAIN = str.maketrans(
    dict(zip("♔♕♖♗♘♚♛♜♝♞", "KQRBN" * 2, strict=True))
    | dict.fromkeys("♙♟\ufe0e\ufe0f", "")
    | dict.fromkeys("‐‑–—−", "-")
    | dict.fromkeys("×:", "x")
)


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
        positions: also a `P:` row for each position, without values: `rookworld_trl.chess.sources` fills them in.
    """
    seen: set[str] = set()
    moves: set[tuple[str, str]] = set()
    for tags, text in _games(_lines(path)):
        words, end = _main_line(text)
        if not (tags or words or end):  # nothing but remarks
            continue
        report.games += 1
        board = _start(chess.pgn.Headers(dict(_TAGS.findall(tags))), report)
        if board is None:
            continue
        history: list[str] = []
        for move in _moves(board, words, end, report):
            fen, key, uci = board.fen(), position_key(board.fen()), move.uci()
            if positions and key not in seen:
                report.kept["policy"] += 1
                yield row_of("policy", policy.prompt(fen), "", phase(board), game=str(report.games))
            seen.add(key)
            if (key, uci) in moves:
                report.repeated += 1
            else:
                moves.add((key, uci))
                report.kept["environment"] += 1
                target = environment.format_completion(environment.transition(fen, uci))
                prompt = environment.prompt(fen, uci, history)
                yield row_of("environment", prompt, target, stratum(board, uci), game=str(report.games))
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


def _games(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The text of each game: its tags and its moves.

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
            ended = not inside and _RESULT.search(line) is not None
        elif _TAG.match(line):
            if moves or (line.startswith("[Event ") and tags):
                yield "".join(tags), "".join(moves)
                tags, moves, inside = [], [], False
            tags.append(line)
        elif line.isspace():
            ended = True
        elif not line.startswith("%"):
            if moves and ended and _FIRST_MOVE.match(line):
                yield "".join(tags), "".join(moves)
                tags, moves = [], []
            moves.append(line)
            inside = _ends_inside(line)
            ended = not inside and _RESULT.search(line) is not None
    if tags or moves:
        yield "".join(tags), "".join(moves)


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


def _main_line(text: str) -> tuple[list[str], str]:
    """The moves of a game as they are written, without their remarks, and why there are no more, if that is a fault."""
    words: list[str] = []
    depth, over = 0, False  # of variations, which may stand anywhere; a result was read
    for token in _TOKEN.finditer(text.translate(_PLAIN)):
        kind, found = token.lastgroup, token[0]
        if kind == "bracket":
            depth += 1 if found == "(" else -1
            if depth < 0:  # so what was taken for the main line may be a variation
                return [], "a variation that never began"
        elif depth == 0 and kind == "result":
            over = True
        elif depth == 0 and kind == "first" and len(words) > 1:
            return words, "another first move"
        elif depth == 0 and kind == "word":
            if found.rstrip("!?") in _NULL_MOVES:
                return words, "a null move"
            word = _MARKS.sub("", found.lstrip(".…"))
            if word and word not in _REMARKS:
                if over or not (_MOVE.fullmatch(word) or _CASTLING.fullmatch(word)):
                    return words, f"{found!r} behind the result" if over else f"unreadable: {found!r}"
                words.append(word)
    return words, "a variation that never ends" if depth else ""


def _moves(board: chess.Board, words: Sequence[str], end: str, report: GamesReport) -> list[chess.Move]:
    """The moves of a main line up to the first that is illegal; none, counted, where the pieces have other letters than
    the English ones, for a letter that two languages share means another piece in each. `end`: why the words end early.
    """
    used = {letter for word in words if (match := _MOVE.fullmatch(word)) for letter in match.groups("")}
    if not used <= {"", *"KQRBNqrbn"}:
        report.skipped["other piece letters than K Q R B N"] += 1
        return []
    board, moves = board.copy(stack=False), []
    try:
        for word in words:
            moves.append(board.push_san(re.sub(r"e\.?p$", "", word)))
    except ValueError as error:
        end = str(error)
    if not moves:
        report.skipped["no move can be read" if end else "no moves"] += 1
    elif end:
        report.cut += 1
        report.first_cut = report.first_cut or f"game {report.games}, {end}"
    return moves


def _start(headers: chess.pgn.Headers, report: GamesReport) -> chess.Board | None:
    """The board that a game starts from; None, counted, for a game that is not of standard chess."""
    try:
        standard = headers.variant() is chess.Board
    except ValueError:  # a name that python-chess does not know
        standard = False
    try:
        board = headers.board() if standard else None
    except ValueError:
        report.skipped["unreadable start position"] += 1
        return None
    if board is None or board.chess960:
        report.skipped["a chess variant"] += 1
        return None
    if not board.is_valid():
        report.skipped["illegal start position"] += 1
        return None
    return board
