"""SIGKILL, which nothing survives: at each file operation of a real save, and at random moments of a whole run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rookworld_trl.checkpointing import store
from tests.support.checkpoint_diff import differences
from tests.support.toy import StopAt, make_trainer

ROOT = Path(__file__).parents[2]
# What a save does to the disk, by its audit event; fsync has none and is wrapped.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def save_and_die(trainer: Any, operation: int, output_dir: Path) -> bool:
    """Save in a child process that kills itself before its n-th file operation; whether it came to the end."""
    generator = random.getstate()
    child = os.fork()
    if child:
        return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 7
    count = 0

    def die() -> None:
        nonlocal count
        count += 1
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and str(output_dir) in str(arguments[0]):
            die()

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        die()
        real_fsync(descriptor)

    try:
        random.setstate(generator)  # Python seeds it again after a fork
        sys.addaudithook(hook)
        os.fsync = fsync  # type: ignore[assignment]
        trainer.args.output_dir = str(output_dir)
        trainer._save_checkpoint(trainer.model, None)
    finally:
        os._exit(7)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_sigkill_at_every_file_operation_of_a_save(tmp_path: Path) -> None:
    """Whatever the operation, the newest valid checkpoint is the one before or the new one, and resuming is exact."""
    options: dict[str, Any] = {"max_steps": 4, "num_iterations": 2, "gradient_accumulation_steps": 2}
    options["save_total_limit"] = 1  # so that the one before is deleted in the end
    make_trainer(tmp_path / "whole", **options).train()
    trainer = make_trainer(tmp_path / "short", **{**options, "save_steps": 2})
    trainer.add_callback(StopAt(3))
    trainer.train()  # holds the state after step 3, has saved after step 2
    trainer.state.log_history.pop()  # the summary of a run that has ended
    assert [f.name for f in store.list_checkpoints(tmp_path / "short")] == ["checkpoint-2"]
    operation, done, outcomes = 0, False, []
    while not done:
        operation += 1
        output_dir = tmp_path / f"killed-{operation}"
        shutil.copytree(tmp_path / "short", output_dir)
        done = save_and_die(trainer, operation, output_dir)
        newest = store.newest_valid(output_dir)
        assert newest is not None, f"nothing to resume from after a kill at operation {operation}"
        outcomes.append(newest.name)
        store.sweep(output_dir)
        assert store.newest_valid(output_dir) == newest
        assert not [path.name for path in output_dir.iterdir() if path.name.startswith(".")]
    assert operation > 30, "too few operations were seen for a save of a dozen files"
    assert outcomes == sorted(outcomes), "once the new checkpoint is there it stays"
    assert set(outcomes) == {"checkpoint-2", "checkpoint-3"}
    for chosen in ("checkpoint-2", "checkpoint-3"):
        killed = tmp_path / f"killed-{outcomes.index(chosen) + 1}"
        resumed = make_trainer(killed, **options)
        resumed.train(resume_from_checkpoint=True)
        found = differences(tmp_path / "whole" / "checkpoint-4", killed / "checkpoint-4")
        assert [line for line in found if "run_id" not in line] == []


def killed(folder: Path, kills: int, steps: int) -> dict[str, Any]:
    """What became of runs of so many steps, killed at random moments; `tests.support.kills` says how."""
    command = [sys.executable, "-m", "tests.support.kills", str(folder), str(kills), str(steps)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    """Of a day when it ran, `benchmarks/results/kill_resume.json` tells."""
    result = killed(tmp_path, kills=200, steps=24)
    assert result["kills"] >= 200
    assert result["lost"] == []
