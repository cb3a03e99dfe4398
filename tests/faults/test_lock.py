"""One run at a time in an output folder, and what happens to a run whose folder is taken away."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.stopping import (
    BAD_INPUT,
    LOCK_FILE,
    UNRECOVERABLE,
    FolderInUseError,
    locked,
    reclaim,
    reported,
)
from rookworld_trl.checkpointing.store import CheckpointError
from tests.support.processes import ROOT, another_run
from tests.support.toy import make_trainer


def test_a_second_run_is_refused_by_name_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, max_steps=1).train()
    with another_run(run) as process:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        trainer = make_trainer(run, max_steps=2)
        found = rf"run': another run is at work there \(process {process.pid} on {socket.gethostname()}.*\)\. Wait"
        with pytest.raises(SystemExit) as exit_, reported():
            trainer.train()
        assert exit_.value.code == BAD_INPUT
        with pytest.raises(FolderInUseError, match=found):
            trainer.train()
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run} == {
            path: time for path, time in before.items() if path != run
        }
        process.send_signal(signal.SIGKILL)  # nothing is cleared up
        process.wait()
        trainer.train()
    assert store.newest_valid(run) == run / "checkpoint-2"
    assert not (run / LOCK_FILE).exists()


def test_the_same_process_may_take_it_again(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path / "." / ".." / tmp_path.name):
            pass
        text = (tmp_path / LOCK_FILE).read_text()
        assert text.startswith(f"process {os.getpid()} on {socket.gethostname()}, since 2")
    assert not (tmp_path / LOCK_FILE).exists()


KILLED = """
import os, signal, sys, time
from rookworld_trl.checkpointing.stopping import locked
reading, writing = os.pipe()
with locked(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.write(writing, b"at work")
        time.sleep(600)
    os.read(reading, 7)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_lock_goes_with_a_killed_run_though_its_worker_lives_on(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.wait()
        try:
            assert (tmp_path / LOCK_FILE).exists()
            with locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


class Deletes(TrainerCallback):
    """Takes the run's folder away after a step, and perhaps starts another run there."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    def on_step_begin(self, args, state, control, **_) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            shutil.rmtree(self.folder)


def test_a_folder_deleted_under_the_run_is_said_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(run, max_steps=3)
    trainer.add_callback(Deletes(run, 1))
    trainer.train()
    assert [path.name for path in store.list_checkpoints(run)] == ["checkpoint-3", "checkpoint-2"]
    said = [record for record in caplog.records if "was deleted while this run was at work in it" in record.message]
    assert [record.levelno for record in said] == [logging.ERROR]
    assert not (run / LOCK_FILE).exists()


def test_a_run_whose_place_another_has_taken_stops(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        shutil.rmtree(run)
        run.mkdir()
        with another_run(run):
            with pytest.raises(FolderInUseError, match="another run is at work there"):
                reclaim(run)
            trainer = make_trainer(run, max_steps=1)
            with pytest.raises(CheckpointError, match="another run is at work there") as error:
                trainer.train()
            assert error.value.exit_code == UNRECOVERABLE
        reclaim(run)
    assert not (run / LOCK_FILE).exists()
