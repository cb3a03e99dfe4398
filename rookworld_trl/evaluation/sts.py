"""Strategic Test Suite (Corbit, Swaminathan): quiet positions in which each good move earns up to 100 points.

Reads the EPD file of fsmosca/strategic-test-suite (MIT), which the user downloads: operations `id` (theme and
number), `c8` (points) and `c9` (the moves they belong to, UCI).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chess
from transformers import PreTrainedModel

from rookworld_trl.evaluation.metrics import Metric
from rookworld_trl.evaluation.suite import Answer, SuiteItem, SuiteResult, answer, trivial_metrics, trivial_scores

FULL_POINTS = 100

METRICS = [
    Metric("points", "points, of all", lambda s: s["points"], lambda s: FULL_POINTS, proportion=False),
    Metric("best", "full points", lambda s: s["best"]),
    Metric("legal", "B legal", lambda s: s["legal"]),
    Metric("parsed", "parsable", lambda s: s["parsed"]),
    *trivial_metrics("points, of all", FULL_POINTS),
]

_THEME = re.compile(r"STS\(v[\d.]+\) ([^.]+)\.")


@dataclass(frozen=True, slots=True)
class Position:
    """A test position; `points` by UCI move, any other move earns 0."""

    name: str
    theme: str
    board: chess.Board
    points: dict[str, int]


def read_sts(path: Path | str) -> list[Position]:
    """Read the suite's EPD file. EPD has no clocks: the positions stand at move 1, half-move clock 0.

    Raises:
        ValueError: no positions, or a malformed line; names it.
    """
    positions = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                positions.append(_position(line))
            except (ValueError, KeyError, AttributeError) as error:
                reason = f"operation {error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, line {number} is no position of the suite: {reason}") from error
    if not positions:
        raise ValueError(f"{path}: holds no positions")
    return positions


def run_sts(
    model: PreTrainedModel,
    tokenizer: Any,
    positions: Sequence[Position],
    *,
    temperature: float = 0.0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> SuiteResult:
    """Ask for a move in every position. Arguments and errors as in `complete`."""
    answers = answer(
        model,
        tokenizer,
        [position.board for position in positions],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress="STS" if progress else "",
    )
    items = [_item(position, given) for position, given in zip(positions, answers, strict=True)]
    return SuiteResult("strategic test suite", {"temperature": temperature, "seed": seed}, METRICS, items)


def _item(position: Position, given: Answer) -> SuiteItem:
    points = position.points.get(given.move.uci(), 0) if given.move else 0
    scores: dict[str, float] = {
        "points": points,
        "best": points == FULL_POINTS,
        "legal": given.move is not None,
        "parsed": given.parsed,
    }
    scores |= trivial_scores(position.board, lambda move: position.points.get(move.uci(), 0))
    return SuiteItem(
        position.name, position.theme, given.prompt, given.completion, {k: float(v) for k, v in scores.items()}
    )


def _position(line: str) -> Position:
    board = chess.Board()
    operations = {name: str(value) for name, value in board.set_epd(line.strip()).items()}
    if not board.is_valid():
        raise ValueError(f"the position {board.fen()} is illegal")
    name = operations["id"]
    theme = _THEME.match(name)
    if theme is None:
        raise ValueError(f"operation 'id' is {name!r}; expected 'STS(v...) <theme>.<number>'")
    moves, values = operations["c9"].split(), operations["c8"].split()
    if len(moves) != len(values):
        raise ValueError(f"operations 'c9' and 'c8' have {len(moves)} moves and {len(values)} points")
    for move in moves:
        board.parse_uci(move)
    points = dict(zip(moves, map(int, values), strict=True))
    if max(points.values()) != FULL_POINTS:
        raise ValueError(f"no move of operation 'c9' earns {FULL_POINTS} points")
    return Position(name, theme[1], board, points)
