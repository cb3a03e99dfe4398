"""A run's folder as data: the logged steps, what happened on the way, both evaluations, and the summary at its end.

Every file may be missing, and the last line of a log may be torn: the run may be going on, or be dead.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rookworld_trl.files import read_rows
from rookworld_trl.measuring import read_results

HTML, SUMMARY = "report.html", "summary.json"
GROUPED = "headline metrics by group"


class RunError(ValueError):
    """A run's folder cannot be reported on; the message names file, place and remedy."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left behind.

    Attributes:
        name: the folder's name.
        steps: the logged steps, oldest first. A step logged twice (a resumed run) counts as logged last.
        summary: `summary.json`, or empty while the run has not finished.
        events: rows of `health.jsonl` and `recovery.jsonl`, each with a `step`, oldest first.
        evaluations: the held-out evaluations that are there, by `before` and `after`.
    """

    name: str
    steps: list[dict[str, Any]]
    summary: Mapping[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluations: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of one logged number, NaN and other texts left out; empty where it was never logged."""
        points = [(row["step"], row[key]) for row in self.steps if _is_number(row.get(key))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def read_run(folder: Path | str) -> Run:
    """Read a run's folder. A torn last line of a log, as an interrupted run leaves it, is passed over.

    Raises:
        RunError: no folder, no file of a run in it, or one that is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; give a run's output folder")
    evaluations = {name: folder / f"evaluation_{name}.parquet" for name in ("before", "after")}
    metrics, summary = folder / "metrics.jsonl", folder / SUMMARY
    if not any(path.exists() for path in (metrics, summary, *evaluations.values())):
        raise RunError(f"{folder} holds neither metrics.jsonl nor summary.json; give a run's output folder")
    events = [row for name in ("health.jsonl", "recovery.jsonl") for row in _read_lines(folder / name)]
    return Run(
        folder.resolve().name,
        _read_steps(metrics),
        read_summary(folder) if summary.exists() else {},
        sorted(events, key=lambda event: event["step"]),
        {name: _read_evaluation(path) for name, path in evaluations.items() if path.exists()},
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows, damaged = read_rows(path)
    if damaged:
        raise RunError(f"{path}, line {damaged[0]} is no object with a number `step`; fix or remove it")
    return rows


def _read_steps(path: Path) -> list[dict[str, Any]]:
    rows: dict[float, dict[str, Any]] = {}
    for row in _read_lines(path):
        # An evaluation and the totals at the end have lines of their own for their step: merge, don't replace.
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def _read_evaluation(path: Path) -> list[Mapping[str, Any]]:
    try:
        return list(read_results(path).values())
    except ValueError as error:
        raise RunError(f"{error}, or remove it to report on the rest") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's `summary.json`.

    Raises:
        RunError: it is no object, or its `metrics` are no list.
    """
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        whole = isinstance(found, dict) and isinstance(found.get("metrics", []), list)
    except ValueError:
        whole = False
    if not whole:
        raise RunError(f"{folder / SUMMARY} is no JSON object with a list `metrics`; make or remove it")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
