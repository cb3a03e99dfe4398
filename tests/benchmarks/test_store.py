"""Stored runs: what is written comes back, and the reports that the pages quote come from what is stored."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import store
from rookworld_trl.measuring.intervals import ratios


def run(seed: int, tasks: dict[str, int]) -> store.Result:
    """Random terms of so many items of each task; seeds differ in their items too."""
    rng = np.random.default_rng(seed)
    terms = {}
    for task, count in tasks.items():
        for mode in store.MODES:
            sides = rng.normal(size=(2, count, len(store.metrics_of(task)))).astype(np.float32)
            terms[task, mode] = (sides[0].astype(np.float64), sides[1].astype(np.float64))
    keys = {task: [f"{seed}-{rng.integers(99)}" for _ in range(count)] for task, count in tasks.items()}
    games = {task: [("", "g")[i % 2] for i in range(count)] for task, count in tasks.items()}
    return store.Result({"arm": "gold", "seed": seed, "minutes": 1.5}, keys, games, terms)


def same(one: store.Result, other: store.Result) -> bool:
    whats = ((each.facts, each.keys, each.games, list(each.terms)) for each in (one, other))
    if next(whats) != next(whats):
        return False
    pairs = [(a, b) for what, sides in one.terms.items() for a, b in zip(sides, other.terms[what], strict=True)]
    return all(np.array_equal(a, b) for a, b in pairs)


def test_runs_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of other items and tasks, written at once: none is lost, none changes another, one name replaces itself."""
    monkeypatch.setattr(store, "FOLDER", tmp_path / "new")
    runs = {f"gold-1.5min-seed{i}": run(i, {"policy": 5 + i, "environment": 3}) for i in range(4)}
    runs |= {"7/gold-1.5min-seed9": run(9, {"environment": 4}), "trials/gold-1.5min-seed8": run(8, {"policy": 2})}
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda each: store.save("dev", *each), runs.items()))
    assert all(same(store.read("dev", name), written) for name, written in runs.items())
    assert store.names("dev") == sorted(runs)[1:5]
    assert store.names("dev", "7") == ["7/gold-1.5min-seed9"]
    assert store.names("test") == []
    store.save("dev", "gold-1.5min-seed0", changed := run(7, {"policy": 6}))
    assert same(store.read("dev", "gold-1.5min-seed0"), changed)
    assert same(store.read("dev", "gold-1.5min-seed1"), runs["gold-1.5min-seed1"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dev.parquet"]
    with pytest.raises(SystemExit, match=r"dev\.parquet holds no run gold-2min-seed1"):
        store.read("dev", "gold-2min-seed1")


def test_the_report_that_pages_quote_has_the_values_of_the_stored_runs() -> None:
    report = json.loads((store.FOLDER / "test-3min.json").read_text(encoding="utf-8"))
    stored: dict[tuple[str, float], list[store.Result]] = {}
    for each in store.names("test"):
        found = store.read("test", each)
        stored.setdefault((found.facts["arm"], found.facts["minutes"]), []).append(found)
    for row in report["values"]:
        runs = stored[row["arm"], report["minutes"][row["arm"]][0]]
        column = [metric.name for metric in store.metrics_of(row["task"])].index(row["metric"])
        by_seed = [float(ratios(*each.terms[row["task"], row["mode"]])[column]) for each in runs]
        assert row["by_seed"] == pytest.approx(by_seed, abs=1e-8), row
