"""Mate in one: does the model's `B:` checkmate? Positions from BIG-bench's checkmate_in_one or Lichess's puzzles.

Any mating move counts, not only the one a file names (Lichess counts so too). The files are the user's: neither is
shipped.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chess
from transformers import PreTrainedModel

from rookworld_trl.evaluation.metrics import Metric
from rookworld_trl.evaluation.suite import Answer, SuiteItem, SuiteResult, answer, trivial_metrics, trivial_scores

LICHESS_COLUMNS = ("PuzzleId", "FEN", "Moves", "Themes")
LICHESS_THEME = "mateIn1"

METRICS = [
    Metric("mate", "B checkmates", lambda s: s["mate"]),
    Metric("mate_in_candidates", "a checkmate among the candidates", lambda s: s["mate_in_candidates"]),
    Metric("legal", "B legal", lambda s: s["legal"]),
    Metric("parsed", "parsable", lambda s: s["parsed"]),
    *trivial_metrics("checkmates"),
]

_MOVE_NUMBER = re.compile(r"\d+\.+")


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A position in which the side to move can checkmate at once."""

    name: str
    board: chess.Board


def read_puzzles(path: Path | str) -> list[Puzzle]:
    """Read BIG-bench's `task.json`, or a CSV of Lichess puzzles (only those of theme mateIn1 are taken).

    Raises:
        ValueError: another kind of file, a malformed one, or one without a mate in one; names the entry.
    """
    path = Path(path)
    readers = {".json": _read_big_bench, ".csv": _read_lichess}
    if path.suffix not in readers:
        raise ValueError(f"{path}: give BIG-bench's task.json or Lichess's puzzles as .csv (decompressed)")
    puzzles = readers[path.suffix](path)
    if not puzzles:
        raise ValueError(f"{path}: holds no mate in one")
    return puzzles


def run_mate_in_one(
    model: PreTrainedModel,
    tokenizer: Any,
    puzzles: Sequence[Puzzle],
    *,
    temperature: float = 0.0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> SuiteResult:
    """Ask for a move in every puzzle. Arguments and errors as in `complete`."""
    answers = answer(
        model,
        tokenizer,
        [puzzle.board for puzzle in puzzles],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress="mate in one" if progress else "",
    )
    items = [_item(puzzle, given) for puzzle, given in zip(puzzles, answers, strict=True)]
    return SuiteResult("mate in one", {"temperature": temperature, "seed": seed}, METRICS, items)


def is_mate(board: chess.Board, move: chess.Move) -> bool:
    """Whether a legal move checkmates."""
    after = board.copy(stack=False)
    after.push(move)
    return after.is_checkmate()


def _item(puzzle: Puzzle, given: Answer) -> SuiteItem:
    scores: dict[str, float] = {
        "mate": given.move is not None and is_mate(puzzle.board, given.move),
        "mate_in_candidates": any(is_mate(puzzle.board, move) for move in given.candidates),
        "legal": given.move is not None,
        "parsed": given.parsed,
    }
    group = "white" if puzzle.board.turn else "black"
    scores |= trivial_scores(puzzle.board, lambda move: is_mate(puzzle.board, move))
    return SuiteItem(puzzle.name, group, given.prompt, given.completion, {k: float(v) for k, v in scores.items()})


def _read_big_bench(path: Path) -> list[Puzzle]:
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        texts = [example["input"] for example in examples]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no BIG-bench task: expected 'examples', each with an 'input' ({error!r})"
        ) from error
    puzzles = []
    for number, text in enumerate(texts):
        board = chess.Board()
        for san in _MOVE_NUMBER.sub(" ", str(text)).split():
            try:
                board.push_san(san)
            except ValueError as error:
                raise ValueError(f"{path}, example {number}, field 'input': {error}") from error
        puzzles.append(_checked(board, f"example {number}", path))
    return puzzles


def _read_lichess(path: Path) -> list[Puzzle]:
    puzzles = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in LICHESS_COLUMNS if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: the first line lacks the columns {missing} of Lichess's puzzle database")
        for row in rows:
            if LICHESS_THEME not in (row["Themes"] or "").split():
                continue
            try:
                board = chess.Board(row["FEN"])
                board.push_uci((row["Moves"] or "").split()[0])  # the opponent's move, which the puzzle starts with
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, line {rows.line_num} ({row['PuzzleId']}): {error}") from error
            puzzles.append(_checked(board, row["PuzzleId"], path))
    return puzzles


def _checked(board: chess.Board, name: str, path: Path) -> Puzzle:
    if not board.is_valid():
        raise ValueError(f"{path}, {name}: the position {board.fen()} is illegal")
    if not any(is_mate(board, move) for move in board.legal_moves):
        raise ValueError(f"{path}, {name}: no mate in one exists in {board.fen()}")
    return Puzzle(name, board)
