"""A run's folder as data: `metrics.jsonl`, one object a logging step, and `summary.json`, written at the end."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUPED = "headline metrics by colour, stake and stratum"
COMPARISON_FIELDS = ("task", "mode", "metric", "before", "after", "difference", "ci_low", "ci_high", "items")


class RunError(ValueError):
    """A run's folder cannot be reported on; the message names file, place and remedy."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left behind.

    Attributes:
        name: the folder's name.
        steps: the logged steps, oldest first. A step logged twice (a resumed run) counts as logged last.
        summary: `summary.json`, or empty while the run has not finished.
    """

    name: str
    steps: list[dict[str, Any]]
    summary: Mapping[str, Any]

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of one logged number, NaN and other texts left out; empty where it was never logged."""
        points = [(row["step"], row[key]) for row in self.steps if _is_number(row.get(key))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        """Before/after rows of all metrics, or none."""
        return list(self.summary.get("metrics", []))


def losses(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The rows that are significant losses, and how many rows could have been one.

    Rows of an older version don't say which direction is better; there, less counts as a loss.
    """
    judged = [row for row in rows if row.get("better", 1) and row["difference"] is not None]
    return [row for row in judged if row.get("loss", row["ci_high"] < 0)], len(judged)


def shown(value: float | None, spec: str, sign: str = "", unit: str = "") -> str:
    """A number as its row's `format` says: "percent", or a format spec."""
    if value is None:
        return "n/a"
    return f"{100 * value:{sign}.1f}{unit}" if spec == "percent" else f"{value:{sign}{spec}}"


def change(row: Mapping[str, Any]) -> str:
    """A row's difference and interval: `-4.0 [-5.9, -2.1]`."""
    spec = row.get("format", ".3f")
    difference, low, high = (shown(row[name], spec, "+") for name in ("difference", "ci_low", "ci_high"))
    return difference if row["difference"] is None else f"{difference} [{low}, {high}]"


def trivial(row: Mapping[str, Any]) -> str:
    """What trivial players get on the row's items: `random legal 85.8, first legal 87.5`."""
    found = row.get("baselines") or {}
    return ", ".join(f"{player} {shown(value, row.get('format', '.3f'))}" for player, value in found.items())


def read_run(folder: Path | str) -> Run:
    """Read a run's folder. A torn last line of `metrics.jsonl`, as an interrupted run leaves it, is passed over.

    Raises:
        RunError: no folder, neither file in it, or one that is malformed.
    """
    folder = Path(folder)
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; give a run's output folder")
    if not metrics.exists() and not summary.exists():
        raise RunError(f"{folder} holds neither metrics.jsonl nor summary.json; give a run's output folder")
    return Run(
        folder.resolve().name,
        _read_steps(metrics) if metrics.exists() else [],
        _read_summary(summary) if summary.exists() else {},
    )


def _read_steps(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    rows: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number} is no JSON: {error}; mend or remove it") from error
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise RunError(f"{path}, line {number}: expected an object with a number 'step'")
        # Trainers log a last line with only totals for the final step: merge, don't replace.
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is no JSON: {error}; run again, or remove it to report on metrics.jsonl alone"
        ) from error
    if not isinstance(summary, dict):
        raise RunError(f"{path}: expected an object")
    if not isinstance(summary.get("metrics", []), list):
        raise RunError(f"{path}, field 'metrics': expected a list of comparisons")
    for i, row in enumerate(summary.get("metrics", [])):
        missing = (
            [name for name in COMPARISON_FIELDS if name not in row] if isinstance(row, dict) else COMPARISON_FIELDS
        )
        if missing:
            raise RunError(f"{path}, field 'metrics', entry {i} lacks {', '.join(missing)}")
    return summary


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
