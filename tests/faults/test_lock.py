"""One run at a time in an output folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.stopping import BAD_INPUT, LOCK_FILE, FolderInUseError, locked, reported
from tests.support.processes import ROOT, another_run
from tests.support.toy import make_trainer


def test_a_second_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, max_steps=1).train()
    with another_run(run) as process:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        trainer = make_trainer(run, max_steps=2)
        with pytest.raises(SystemExit) as exit_, reported():
            trainer.train()
        assert exit_.value.code == BAD_INPUT
        with pytest.raises(FolderInUseError, match=r"run': another run is at work there\. Wait for it"):
            trainer.train()
        assert {path: path.stat().st_mtime_ns for path in before} == before
        process.send_signal(signal.SIGKILL)  # nothing is cleared up
        process.wait()
        trainer.train()
    assert store.newest_valid(run) == run / "checkpoint-2"
    assert not (run / LOCK_FILE).exists()


def test_the_same_process_may_take_it_again(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path / "." / ".." / tmp_path.name):
            pass
        assert (tmp_path / LOCK_FILE).exists()
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
