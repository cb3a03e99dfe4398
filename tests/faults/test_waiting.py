"""Processes that wait for one of them outlast the group's time limit, and not the death of that one."""

import os
import time
from datetime import timedelta

import pytest
from torch import distributed

from rookworld_trl.checkpointing.exits import others_wait
from tests.support.processes import call

LIMIT, WORK = 2, 5  # seconds


def worker(how: str) -> None:
    """The first of two processes works for longer than the group's time limit."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    first = distributed.get_rank() == 0
    if how == "barrier":
        time.sleep(WORK * first)
        distributed.barrier()
    else:
        with others_wait():
            time.sleep(WORK * first)
            if first and how == "dies":
                os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "succeeds"), [("others_wait", True), ("barrier", False), ("dies", False)])
def test_the_others_wait(how: str, succeeds: bool) -> None:
    started = time.perf_counter()
    done = call(worker, how)
    assert (done.returncode == 0) is succeeds, done.stderr[-3000:]
    assert WORK < time.perf_counter() - started < 120
