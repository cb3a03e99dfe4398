"""A fault on one of two processes: both decide alike, stay equal to the last bit, and neither waits for the other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.injection import train_each
from tests.support.processes import called

DEADLINE = 120.0  # seconds from the start of training to both errors; a process left waiting takes gloo's 30 minutes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KINDS = ["loss", "gradient", "weight", "unused weight", "moments", "huge weights", "late gradient"]
PASSING = [(number % 2 if kind == "loss" else 1, 1 + 4 * number, kind) for number, kind in enumerate(KINDS)]
PASSING.append((0, 29, "loss"))
RUNS: dict[str, tuple[list[tuple[int, int, str]], dict[str, Any]]] = {
    "passing": (PASSING, {"max_steps": 32, "ddp_timeout": 321}),
    "lasting": ([(step % 2, step, "gradient") for step in (2, 3, 4, 5)], {"max_steps": 9}),
    "exception": ([(1, 2, "exception")], {"max_steps": 4}),
    "rewards": ([(1, 2, "rewards"), (0, 4, "rewards")], {"max_steps": 5}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All runs, one after the other in two processes."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    same = {"save_strategy": "no", "lr_scheduler_type": "constant"}
    called(train_each, [(folders[name], plan, same | options) for name, (plan, options) in RUNS.items()])
    return folders


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_faults_on_one_process(folders: dict[str, Path]) -> None:
    both = results(folders["passing"])
    assert [result["error"] for result in both] == ["", ""]
    assert all(result["finite"] for result in both)
    # One that is stopped, not dead, ends the other then; on the CPU transformers forgets to set it.
    assert [result["limit"] for result in both] == [321, 321]
    assert both[0]["hashes"] == both[1]["hashes"]
    assert len(both[0]["hashes"]) == 32
    events = [json.loads(line) for line in (folders["passing"] / "recovery.jsonl").read_text().splitlines()]
    assert [(event["step"], event["attempt"]) for event in events] == [(step, 1) for _, step, _ in PASSING]


def test_the_fourth_fault_ends_both(folders: dict[str, Path]) -> None:
    both = results(folders["lasting"])
    assert all(result["error"].startswith("Diverged: training diverged at step 5") for result in both)
    assert both[0]["hashes"] == both[1]["hashes"]
    assert all(result["attempts"] == 4 for result in both)


def test_a_reward_that_fails_on_one_process_stops_both_at_once(folders: dict[str, Path]) -> None:
    (other, failed), own = results(folders["exception"]), "ZeroDivisionError: this"
    assert failed["error"].startswith(own)
    assert other["error"].startswith("RuntimeError: a reward function failed on process 1; its traceback:")
    assert own in other["error"]
    assert len(other["hashes"]) == len(failed["hashes"]) == 1
    assert max(other["seconds"], failed["seconds"]) < DEADLINE


def test_broken_rewards_on_one_process_are_left_out(folders: dict[str, Path]) -> None:
    both = results(folders["rewards"])
    assert [result["error"] for result in both] == ["", ""]
    assert not (folders["rewards"] / "recovery.jsonl").exists()  # the other process's rewards were numbers
    assert both[0]["hashes"] == both[1]["hashes"]
    assert len(set(both[0]["hashes"])) == 5
