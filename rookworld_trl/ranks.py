"""What the processes of one run agree on, wait for and leave together: every process calls each of these."""

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import distributed

T = TypeVar("T")


def decided(main: bool, decide: Callable[[], T]) -> T:
    """Run `decide` in the main process alone and give its result to all; what it raises there is raised in all.

    Args:
        main: whether this is the main process.
    """
    outcome: list[Any] = [None, None]
    if main:
        try:
            outcome[0] = decide()
        except Exception as error:  # any: the others are waiting
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sharded(accelerator: Any) -> bool:
    """Whether no process has all weights."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def anywhere(flag: bool, accelerator: Any) -> bool:
    """Whether the flag is set in any process; waits for all of them."""
    return max(largest([float(flag)], accelerator)) > 0


def largest(values: Sequence[float], accelerator: Any) -> list[float]:
    """The largest of each value over all processes; NaN if it is NaN in one."""
    if accelerator.num_processes == 1:
        return list(values)
    mine = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(mine).view(-1, len(values)).amax(dim=0).tolist()


def everyones(values: list[T]) -> list[T]:
    """The values of all processes, one process after the other."""
    return gather_object(values)


def fail_together(error: Exception | None, what: str) -> None:
    """Go on if no process has failed.

    Args:
        what: names what was tried, for the others' message.

    Raises:
        Exception: `error` itself, with its traceback, in the process that it happened in.
        RuntimeError: in the other processes, with that traceback as text.
    """
    failures = everyones(["".join(traceback.format_exception(error)) if error is not None else ""])
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure:
            raise RuntimeError(f"{what} failed on process {rank}; its traceback:\n{failure}")


def close_process_group() -> None:
    """Leave the process group for good, once no trainer is in use any more. Without a group: nothing happens.

    A trainer is a cycle of references that holds the group, and gloo's threads live as long as it does. One that still
    waits for the interpreter's lock while the interpreter ends aborts the process: -6, after everything went well. And
    where a trainer's model is what holds the group last, collecting it waits for those threads with the lock in hand,
    so that one that waits for the lock never ends (pytorch#56297): trainers go first.
    """
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
        gc.collect()  # what Python itself has left of the group, which lets go of the lock


@contextmanager
def others_wait() -> Iterator[None]:
    """For work of one process that the others wait for, such as an evaluation; every process goes through the block.

    A barrier on NCCL fails when the work outlasts the group's time limit, and takes the waiting GPUs' time. This one
    waits on the CPU, for days if need be; where the working process ends, the others fail at once.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    yield
    distributed.barrier(group)
    distributed.destroy_process_group(group)
