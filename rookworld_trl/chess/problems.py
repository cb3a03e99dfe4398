"""Problems: does the model's `B:` find the move, or the moves, that a test suite or a puzzle asks for?

Mate in one, test suites in EPD with best moves, moves to avoid or points, and puzzles of several moves have one shape:
positions in a row, and in each what every move is worth. A problem is worth the product, so that a puzzle counts only
if each of its moves is found. A move that checkmates ends it, whatever the file's line is, as on Lichess.

| file | what is read |
|---|---|
| `.epd` | points (`c8` and `c9`), else best moves `bm`, else moves to avoid `am`; SAN or UCI |
| `.csv`, `.jsonl`, `.parquet` | columns `FEN` and `Moves`: Lichess's puzzles |

Each also gzipped (`.gz`) or, as Lichess has them, as `.zst`. EPD has no clocks: unless `hmvc` and `fmvn` or two more
FEN fields tell them, positions stand at move 1.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq

from rookworld_trl.chess import policy
from rookworld_trl.chess.accuracy import PLAYERS, most_material
from rookworld_trl.chess.strata import clean, mating_moves
from rookworld_trl.measuring.metrics import mean, ratio, share
from rookworld_trl.measuring.result import Item, Result

Ask = Callable[[Sequence[str], str], list[str]]  # `P:` prompts and the title of a progress bar; their completions
Worths = Mapping[str, float]  # by UCI move, 1 for the best; moves that are not listed are worth nothing


@dataclass(frozen=True, slots=True)
class Problem:
    """Positions to find moves in.

    Attributes:
        name: its id.
        group: what its result is filed under.
        boards: the positions. Each stands behind the right move of the one before and the answer to it.
        worths: of each position.
        game: what the positions were taken from, "" if not known; intervals are over games where some share one.
    """

    name: str
    group: str
    boards: tuple[chess.Board, ...]
    worths: tuple[Worths, ...]
    game: str = ""


def run_problems(ask: Ask, problems: Sequence[Problem], name: str) -> Result:
    """Ask for a move in every position of every problem.

    All positions are asked at once, those behind a move that was not found too: they do not change what is solved, and
    legality is counted over all of them.

    Returns:
        One item a problem, with the answers joined by line ends.
    """
    prompts = [policy.prompt(board.fen()) for problem in problems for board in problem.boards]
    texts = iter(ask(prompts, name))
    items = [score_problem(problem, [next(texts) for _ in problem.boards]) for problem in problems]
    graded = any(value not in (0, 1) for problem in problems for worths in problem.worths for value in worths.values())
    metrics = [
        mean("solved", "points, of all", "percent") if graded else share("solved", "solved"),
        *([share("best", "full points")] if graded else []),
        share("in_candidates", "a best move among the candidates"),
        ratio("legal", "B legal", "positions"),
        ratio("parsed", "parsable", "positions"),
    ]
    return Result(name, metrics, items, players=PLAYERS["policy"])


def score_problem(problem: Problem, completions: Sequence[str]) -> Item:
    """Score the completions, one a position."""
    answers = [policy.read(text) for text in completions]
    legal = [sorted(move.uci() for move in board.legal_moves) for board in problem.boards]
    played = [each.best if each and each.best in moves else "" for each, moves in zip(answers, legal, strict=True)]
    listed = answers[0].moves if answers[0] else ()
    firsts = [moves[0] for moves in legal]
    material = [most_material(board.fen(), moves) for board, moves in zip(problem.boards, legal, strict=True)]
    solved = worth(problem, [{move: 1.0} for move in played])
    scores = {
        "solved": solved,
        "best": float(solved == 1),
        "in_candidates": float(any(problem.worths[0].get(move) == 1 for move in listed)),
        "legal": float(sum(map(bool, played))),
        "parsed": float(sum(each is not None for each in answers)),
        "positions": float(len(answers)),
        "random.solved": worth(problem, [dict.fromkeys(moves, 1 / len(moves)) for moves in legal]),
        "first.solved": worth(problem, [{move: 1.0} for move in firsts]),
        "material.solved": worth(problem, [{move: 1.0} for move in material]),
    }
    prompts = [policy.prompt(board.fen()) for board in problem.boards]
    texts = "\n".join(prompts), "\n".join(completions)
    return Item(problem.name, scores, *texts, {"group": problem.group}, problem.game)


def worth(problem: Problem, choices: Sequence[Mapping[str, float]]) -> float:
    """What a player gets for a problem who chooses moves with these probabilities, position by position."""
    value = 1.0
    for board, worths, chosen in reversed(list(zip(problem.boards, problem.worths, choices, strict=True))):
        found = [(move, share * worths[move]) for move, share in chosen.items() if worths.get(move)]
        mates = {move.uci() for move in mating_moves(board)} if found else ()
        value = sum(gained * (1.0 if move in mates else value) for move, gained in found)
    return value


# Files

RATING_BAND = 400

_FEN_CLOCKS = re.compile(r"(\S+ \S+ \S+ \S+)\s+(\d+)\s+(\d+)\s*(?:;\s*)?(.*)")
_GAME_COMMENT, _LICHESS_GAME = re.compile(r"(?:^|, )game (\d+)$"), re.compile(r"lichess\.org/(\w+)")
_SUITE_PREFIX, _NUMBER = re.compile(r"STS\(v[\d.]+\) "), re.compile(r"[\s.,#:_-]*\d+$")


def is_problem_file(path: Path) -> bool:
    """Whether a file is one of problems rather than one of prompts. A file that cannot be read is none."""
    try:
        first = next(_entries(path))[1] if _kind(path) in (".csv", ".jsonl", ".parquet") else {}
        return _kind(path) == ".epd" or ("fen" in first and "prompt" not in first)
    except (OSError, ValueError, TypeError, AttributeError, StopIteration):
        return False


def read_problems(path: Path | str, max_rows: int | None = None) -> list[Problem]:
    """Read a file of problems, or its first `max_rows`.

    Grouped by rating where there are ratings, else by theme where ids tell themes (`Undermine.001`), else by colour.

    Raises:
        ValueError: another kind of file, no problems, or a malformed one; names the file, its entry and the field.
    """
    path = Path(path)
    if _kind(path) not in (".epd", ".csv", ".jsonl", ".parquet"):
        raise ValueError(f"{path}: give problems as .epd, .csv, .jsonl or .parquet")
    try:
        problems = []
        for where, entry in islice(_entries(path), max_rows):
            try:
                problems.append(_of_epd(entry, where) if isinstance(entry, str) else _of_puzzle(entry, where))
            except (ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
                reason = f"field {error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, {where}: {reason}") from error
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not problems:
        raise ValueError(f"{path}: holds no problems")
    if len({problem.group for problem in problems}) == 1:
        colours = ["white" if problem.boards[0].turn else "black" for problem in problems]
        problems = [replace(problem, group=colour) for problem, colour in zip(problems, colours, strict=True)]
    return problems


def _entries(path: Path) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Each entry with its place in the file: a line of EPD, or a row, its columns in small letters."""
    rows: Iterable[Mapping[str, Any]]
    if _kind(path) == ".parquet":
        rows = (row for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist())
    else:
        lines = io.TextIOWrapper(pa.input_stream(str(path)), encoding="utf-8", newline="")  # which sees .gz and .zst
        if _kind(path) == ".epd":
            filled = ((number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip())
            yield from ((f"line {number}", line) for number, line in filled if not line.startswith("#"))
            return
        rows = csv.DictReader(lines) if _kind(path) == ".csv" else map(json.loads, filter(str.strip, lines))
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", {name.lower(): value for name, value in row.items()}


def _of_epd(line: str, name: str) -> Problem:
    if clocked := _FEN_CLOCKS.fullmatch(line):
        line = f"{clocked[1]} hmvc {clocked[2]}; fmvn {clocked[3]}; {clocked[4]}"
    board = chess.Board()
    operations: dict[str, Any] = board.set_epd(line)
    clean(board)
    if operations.get("c8") and operations.get("c9"):
        moves, values = _words(operations["c9"]), list(map(float, _words(operations["c8"])))
        if len(moves) != len(values):
            raise ValueError(f"operations 'c9' and 'c8' have {len(moves)} moves and {len(values)} points")
        if max(values) <= 0 or min(values) < 0:
            raise ValueError(f"points {values}: expected 0 or more, and one above 0")
        points = dict(zip(moves, values, strict=True))
        worths: Worths = {board.parse_san(move).uci(): value / max(values) for move, value in points.items()}
    elif operations.get("bm"):
        worths = _best(board, [move.uci() for move in operations["bm"]])
    elif operations.get("am"):
        avoided = {move.uci() for move in operations["am"]}
        worths = {move.uci(): 1.0 for move in board.legal_moves if move.uci() not in avoided}
    else:
        raise ValueError("neither points ('c8' and 'c9') nor 'bm' nor 'am' says what is right")
    if not worths:
        raise ValueError("no legal move is worth anything")
    name = str(operations.get("id") or name)
    group = _NUMBER.sub("", _SUITE_PREFIX.sub("", name))
    return Problem(name, group, (board,), (worths,), _game(operations))


def _of_puzzle(row: Mapping[str, Any], name: str) -> Problem:
    """A puzzle as Lichess stores it: the opponent moves first, then every second move is to be found."""
    board = chess.Board(row["fen"])
    clean(board)
    line = _words(row["moves"])
    if len(line) < 2:
        raise ValueError(f"field 'Moves': {row['moves']!r} needs the opponent's move and at least one to find")
    boards, worths = [], []
    for number, uci in enumerate(line):
        move = board.parse_san(uci)  # which reads UCI too
        if number % 2:
            boards.append(board.copy(stack=False))
            worths.append(_best(board, [move.uci()]))
        board.push(move)
    rated, rating = row.get("rating") not in (None, ""), row.get("rating") or 0
    low = int(float(rating)) // RATING_BAND * RATING_BAND
    band = f"rated {low:4}-{low + RATING_BAND - 1}" if rated else ""
    return Problem(str(row.get("puzzleid") or name), band, tuple(boards), tuple(worths), _game(row))


def _game(fields: Mapping[str, Any]) -> str:
    """What the position was taken from: a column `game`, Lichess's `GameUrl`, or `game 7` at the end of EPD's `c0`."""
    if (own := fields.get("game")) not in (None, ""):
        return str(own)
    found = _LICHESS_GAME.search(str(fields.get("gameurl"))) or _GAME_COMMENT.search(str(fields.get("c0")))
    return found[1] if found else ""


def _best(board: chess.Board, moves: list[str]) -> Worths:
    """The moves and every one that checkmates are worth all."""
    return dict.fromkeys([*moves, *(move.uci() for move in mating_moves(board))], 1.0)


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(name).suffix
