"""Processes that wait for one of them outlast the group's time limit, and not the death of that one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("how", "succeeds"), [("others_wait", True), ("barrier", False), ("dies", False)])
def test_the_others_wait(how: str, succeeds: bool) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    started = time.perf_counter()
    done = subprocess.run(
        [*launcher, "-m", "tests.faults.waiting_worker", how],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode == 0) is succeeds, done.stderr[-3000:]
    assert time.perf_counter() - started > 5
