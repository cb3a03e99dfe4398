"""Processes that wait for one of them outlast the group's time limit, and not the death of that one; none waits for
ever for its own threads as it leaves."""

import faulthandler
import os
import re
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from rookworld_trl.ranks import close_process_group, others_wait
from tests.support.processes import call

LIMIT, WORK = 2, 5  # seconds
LIMIT_PASSED = f"Timed out waiting {LIMIT}000ms"  # gloo's words


def worker(how: str) -> None:
    """The first of two processes works for longer than the group's time limit."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    first = distributed.get_rank() == 0
    with others_wait():
        time.sleep(WORK * first)
        if first and how == "dies":
            os._exit(3)


@pytest.mark.slow
def test_the_others_wait_longer_than_the_limit_and_end_when_the_first_dies() -> None:
    for how, code in (("waits", 0), ("dies", 3)):
        started = time.perf_counter()
        done = call(worker, how)
        assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
        assert not code or re.search(rf"exitcode\s*: {code} ", done.stderr), done.stderr[-3000:]
        assert LIMIT_PASSED not in done.stderr, done.stderr[-3000:]  # it did not end earlier, of the limit
        assert WORK < time.perf_counter() - started < 120


def leave_again_and_again() -> None:
    """What a trainer leaves behind, 12 times: a cycle that holds the group, and gloo's threads still at work on tensors
    with attributes, which they need the interpreter to let go of."""
    faulthandler.dump_traceback_later(100, exit=True)
    for _ in range(12):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        trainer = SimpleNamespace(model=DistributedDataParallel(torch.nn.Linear(4, 4)))
        trainer.itself = trainer
        trainer.model(torch.ones(1, 4)).sum().backward()
        for size in (*[1_000] * 7, 200_000):
            tensor = torch.ones(size)
            tensor.of = "the last step"  # type: ignore[attr-defined]
            distributed.all_reduce(tensor, async_op=True)
            del tensor
        del trainer
        close_process_group()
    os._exit(0)  # torch keeps what the last DDP was made with, in a group of one process; this is about the others


@pytest.mark.slow
def test_a_process_that_leaves_waits_for_no_thread_that_waits_for_it() -> None:
    done = call(leave_again_and_again, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
