"""Results on disk: one Parquet file for each split, written anew after each run, so that hours of runs survive a stop.

A row is an item of a run: `run`, `task`, `mode`, `index` (the item's place), `key`, `game`, and of each shown metric
the numerator and the denominator, `top.NAME` and `bottom.NAME` (null: the task has no such metric). Rows of an item
stand together, which makes the file small. What is known of each run lies as JSON in the schema's metadata (`runs`).
"""

import fcntl
import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common import RESULTS
from rookworld_trl import measuring
from rookworld_trl.chess.accuracy import METRICS
from rookworld_trl.measuring.intervals import Array
from rookworld_trl.measuring.metrics import terms

FOLDER = RESULTS / "evidence"
# What the tables of evidence show of each task; all other metrics are in a run's own evaluation.
SHOWN = {
    "policy": ("best_legal", "skill", "best_value", "parsed", "candidates_legal_distinct", "best_in_top5", "top1"),
    "environment": ("exact", "placement_exact", "terminated_recall", "truncated_recall"),
}
MODES = ("greedy", "sampled")
SIDES = ("top", "bottom")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("run", "task", "mode")]
    + [("index", pa.int32()), ("key", pa.string()), ("game", pa.string())]
    + [(f"{side}.{name}", pa.float32()) for names in SHOWN.values() for name in names for side in SIDES]
)


@dataclass(frozen=True)
class Result:
    """Terms of the shown metrics of one run, by task and mode: numerators and denominators, each (items, metrics)."""

    facts: dict[str, Any]
    keys: dict[str, list[str]]
    games: dict[str, list[str]]
    terms: dict[tuple[str, str], tuple[Array, Array]]


def metrics_of(task: str) -> list[Any]:
    return [metric for metric in METRICS[task] if metric.name in SHOWN[task]]  # type: ignore[index]


def result_of(evaluation: Sequence[measuring.Result], facts: dict[str, Any]) -> Result:
    """What is kept of an evaluation."""
    found = Result(facts, {}, {}, {})
    for each in evaluation:
        task, items = each.name, each.items
        found.terms[task, each.mode] = terms([item.scores for item in items], metrics_of(task))
        found.keys[task], found.games[task] = [item.name for item in items], [item.game or "" for item in items]
    return found


def path_of(split: str) -> Path:
    return FOLDER / f"{split}.parquet"


def name_of(arm: str, minutes: float, seed: int, start: str | None = None) -> str:
    """A run's name; those from rookworld-nano (None) have none of a start in front."""
    return f"{'' if start is None else start + '/'}{arm}-{minutes:g}min-seed{seed}"


def names(split: str, start: str | None = None) -> list[str]:
    """The stored runs of a split from one start, sorted."""
    found = _runs(split)
    return sorted(name for name in found if (name.rpartition("/")[0] or None) == start)


def has(split: str, name: str) -> bool:
    return name in _runs(split)


def read(split: str, name: str) -> Result:
    """A stored run.

    Raises:
        SystemExit: there is none of that name.
    """
    if not has(split, name):
        raise SystemExit(f"{path_of(split)} holds no run {name}; `python -m benchmarks.evidence run` makes runs")
    own = (table := _table(split)).filter(pc.equal(table["run"], name))
    found = Result(_runs(split)[name], {}, {}, {})
    for task in SHOWN:
        for mode in MODES:
            rows = own.filter(pc.and_(pc.equal(own["task"], task), pc.equal(own["mode"], mode)))
            if rows.num_rows:
                sides = ([rows[f"{side}.{metric.name}"] for metric in metrics_of(task)] for side in SIDES)
                top, bottom = (np.stack([column.to_numpy() for column in side], axis=1) for side in sides)
                found.terms[task, mode] = top.astype(np.float64), bottom.astype(np.float64)
                found.keys[task], found.games[task] = rows["key"].to_pylist(), rows["game"].to_pylist()
    return found


def save(split: str, name: str, result: Result) -> None:
    """Write a run beside those that are there, whole or not at all; in place of one of the same name."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _alone():
        runs = {**_runs(split), name: result.facts}
        tables = [(table := _table(split)).filter(pc.not_equal(table["run"], name))]
        for (task, mode), sides in result.terms.items():
            count = len(result.keys[task])
            columns: dict[str, Any] = {"run": [name] * count, "task": [task] * count, "mode": [mode] * count}
            columns |= {"index": range(count), "key": result.keys[task], "game": result.games[task]}
            for side, values in zip(SIDES, sides, strict=True):
                metrics = metrics_of(task)
                columns |= {f"{side}.{m.name}": values[:, i].astype(np.float32) for i, m in enumerate(metrics)}
            nulls = [None] * count
            tables.append(pa.table({field.name: columns.get(field.name, nulls) for field in SCHEMA}, schema=SCHEMA))
        order = [(column, "ascending") for column in ("task", "mode", "index", "run")]
        table = pa.concat_tables(tables).sort_by(order).replace_schema_metadata({"runs": json.dumps(runs)})
        partial = path_of(split).with_suffix(".partial")
        pq.write_table(table, partial, compression="zstd", compression_level=3, row_group_size=1 << 24)
        partial.replace(path_of(split))


@contextmanager
def _alone() -> Iterator[None]:
    """Until another process that writes here has done so."""
    folder = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _table(split: str) -> pa.Table:
    path = path_of(split)
    return _read_file(path, path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else SCHEMA.empty_table()


@functools.lru_cache(maxsize=2)
def _read_file(path: Path, changed: int, number: int) -> pa.Table:
    return pq.read_table(path)


def _runs(split: str) -> dict[str, Any]:
    """What is known of each stored run, by name."""
    return json.loads((_table(split).schema.metadata or {}).get(b"runs", b"{}"))  # type: ignore[no-any-return]
