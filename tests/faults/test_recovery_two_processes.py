"""A fault on one of two processes: both decide alike, stay equal to the last bit, and neither waits for the other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.injection import train
from tests.support.processes import called

DEADLINE = 120.0  # seconds from the start of training to both errors; a process left waiting takes gloo's 30 minutes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def launch(folder: Path, plan: list[tuple[int, int, str]], **options: Any) -> list[dict[str, Any]]:
    called(train, folder, plan, {"save_strategy": "no", "lr_scheduler_type": "constant", **options})
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_faults_on_one_process(tmp_path: Path) -> None:
    kinds = ["loss", "gradient", "weight", "unused weight", "moments", "reference", "huge weights", "late gradient"]
    plan = [(number % 2 if kind == "loss" else 1, 1 + 4 * number, kind) for number, kind in enumerate(kinds)]
    plan.append((0, 33, "loss"))
    results = launch(tmp_path, plan, max_steps=36)
    assert [result["error"] for result in results] == ["", ""]
    assert all(result["finite"] for result in results)
    assert results[0]["hashes"] == results[1]["hashes"]
    assert len(results[0]["hashes"]) == 36
    events = [json.loads(line) for line in (tmp_path / "recovery.jsonl").read_text().splitlines()]
    assert [(event["step"], event["attempt"]) for event in events] == [(step, 1) for _, step, _ in plan]
    found = [sorted({rank for ranks in event["faults"].values() for rank in ranks}) for event in events]
    for (rank, _, kind), ranks in zip(plan, found, strict=True):
        assert rank in ranks, kind
    # A gradient is poisoned after it has been averaged, weights are each process's own: the other one saw nothing.
    alone = {kind: ranks for (_, _, kind), ranks in zip(plan, found, strict=True)}
    assert alone["gradient"] == alone["weight"] == alone["unused weight"] == alone["reference"] == [1]
    assert alone["loss"] == [0, 1]  # averaging spreads a NaN gradient


def test_the_fourth_fault_ends_both(tmp_path: Path) -> None:
    results = launch(tmp_path, [(step % 2, step, "gradient") for step in (2, 3, 4, 5)], max_steps=9)
    assert all(result["error"].startswith("Diverged: training diverged at step 5") for result in results)
    assert all(str(tmp_path / "debug-4") in result["error"] for result in results)
    assert results[0]["hashes"] == results[1]["hashes"]
    assert all(result["attempts"] == 4 for result in results)
    assert json.loads((tmp_path / "recovery.json").read_text())["attempts"] == 4


@pytest.mark.parametrize(
    ("kind", "own"), [("exception", "ZeroDivisionError: this"), ("count", "ValueError: The reward")]
)
def test_a_reward_that_fails_on_one_process_stops_both_at_once(kind: str, own: str, tmp_path: Path) -> None:
    other, failed = launch(tmp_path, [(1, 2, kind)], max_steps=4)
    assert failed["error"].startswith(own)
    assert other["error"].startswith("RuntimeError: a reward function failed on process 1; its traceback:")
    assert own in other["error"]
    assert len(other["hashes"]) == len(failed["hashes"]) == 1
    assert max(other["seconds"], failed["seconds"]) < DEADLINE


def test_broken_rewards_on_one_process_are_left_out(tmp_path: Path) -> None:
    results = launch(tmp_path, [(1, 2, "rewards"), (0, 4, "rewards")], max_steps=5)
    assert [result["error"] for result in results] == ["", ""]
    assert not (tmp_path / "recovery.jsonl").exists()  # the other process's rewards were numbers
    assert results[0]["hashes"] == results[1]["hashes"]
    assert len(set(results[0]["hashes"])) == 5
