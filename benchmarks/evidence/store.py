"""Results on disk: one small file for each run, so that hours of runs survive a stop, item by item."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from rookworld_trl.evaluation import Evaluation
from rookworld_trl.evaluation.intervals import Array
from rookworld_trl.evaluation.metrics import METRICS, terms

FOLDER = RESULTS / "evidence"
# What the tables of evidence show of each task; all other metrics are in a run's own evaluation.
SHOWN = {
    "policy": ("best_legal", "skill", "best_value", "parsed", "candidates_legal_distinct", "best_in_top5", "top1"),
    "environment": ("exact", "placement_exact", "terminated_recall", "truncated_recall"),
}


@dataclass(frozen=True)
class Result:
    """Terms of the shown metrics of one run, by task and mode: numerators and denominators, each (items, metrics)."""

    facts: dict[str, Any]
    keys: dict[str, list[str]]
    games: dict[str, list[str]]
    terms: dict[tuple[str, str], tuple[Array, Array]]


def metrics_of(task: str) -> list[Any]:
    return [metric for metric in METRICS[task] if metric.name in SHOWN[task]]  # type: ignore[index]


def place_of(split: str, start: str | None = None) -> tuple[Path, str]:
    """Folder of the results from a start, and what their names begin with; those of rookworld-nano (None) have a folder
    of their own."""
    return (FOLDER / split, "") if start is None else (FOLDER / "starts", f"{start}-{split}-")


def name_of(split: str, arm: str, minutes: float, seed: int, start: str | None = None) -> Path:
    """Where a run's result lies."""
    folder, beginning = place_of(split, start)
    return folder / f"{beginning}{arm}-{minutes:g}min-seed{seed}.npz"


def save(path: Path, evaluation: Evaluation, facts: dict[str, Any]) -> None:
    """Write a run's terms, whole or not at all."""
    arrays: dict[str, Any] = {"facts": json.dumps(facts)}
    for task, mode in evaluation.tasks_and_modes():
        items = evaluation.select(task, mode)
        top, bottom = terms([item.scores for item in items], metrics_of(task))
        arrays |= {f"{task}.{mode}.top": top.astype(np.float32), f"{task}.{mode}.bottom": bottom.astype(np.float32)}
        arrays |= {f"{task}.keys": [item.key for item in items], f"{task}.games": [item.game for item in items]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


def read(path: Path) -> Result:
    with np.load(path) as found:
        facts = json.loads(str(found["facts"]))
        keys = {name[:-5]: found[name].tolist() for name in found if name.endswith(".keys")}
        games = {name[:-6]: found[name].tolist() for name in found if name.endswith(".games")}
        parts = [name[:-4].split(".") for name in found if name.endswith(".top")]
        values = {
            (task, mode): tuple(found[f"{task}.{mode}.{side}"].astype(np.float64) for side in ("top", "bottom"))
            for task, mode in parts
        }
    return Result(facts, keys, games, values)  # type: ignore[arg-type]
