"""What the exit code of a training program says, so that a scheduler or a shell loop can decide what to do next.

    0   done           the last step is reached, or was before
    1   crashed        a bug: its traceback is on stderr
    2   bad input      a setting or file cannot be used: one line says why
    3   diverged       stopped by a check of its own (KL): `--recovery_mode`
    4   unrecoverable  faults again and again, a full disk: a person must look
    75  preempted      saved at the end of a step: `--auto_resume`
    130 interrupted    a second Ctrl-C, or before there was anything to save

An exception class with an attribute `exit_code` says so of itself. `accelerate launch` and `torchrun` report every
failure of their programs as 1; started by `python`, a program's own code is seen.
"""

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from safetensors import SafetensorError
from torch import distributed

from rookworld_trl.settings.parser import EXIT_BAD_INPUT

DONE = 0
CRASHED = 1
BAD_INPUT = EXIT_BAD_INPUT
DIVERGED = 3
UNRECOVERABLE = 4
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class DiskError(RuntimeError):
    """Something that a run needs on a disk cannot be written; the message names place and remedy."""

    exit_code = UNRECOVERABLE


@contextmanager
def needs_disk(what: str | Path, remedy: str = "Make room there") -> Iterator[None]:
    """Raises:
    DiskError: the block met a full disk, or may not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{what} could not be written: {error}. {remedy}") from error


@contextmanager
def reported() -> Iterator[None]:
    """Turn an exception that has an `exit_code` into one line on stderr and that code; others are bugs and pass."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(code) from error


class LastSteps:
    """What follows a training, step by step: one that fails is reported by itself, and the others still run.

    Attributes:
        done: names of the steps that went well.
        code: exit code of the first that did not; `DONE` while there is none.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.code = DONE

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run the block as the step `name`; an error with an `exit_code` or a full disk is one line on stderr."""
        try:
            yield
        except Exception as error:
            full = UNRECOVERABLE if isinstance(error, OSError) else CRASHED
            code = getattr(error, "exit_code", full)
            if code == CRASHED:
                traceback.print_exception(error)
            print(f"error: {name}: {error}", file=sys.stderr)
            self.code = self.code or code
        else:
            self.done.append(name)


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


def run_program(program: Callable[[], int | None]) -> None:
    """Run a program, leave the process group and, unless its exit code is 0 or None, the process.

    Raises:
        SystemExit: with that code; a Ctrl-C that nothing has caught is `INTERRUPTED`, in one line.
    """
    try:
        code = program()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = INTERRUPTED
    close_process_group()
    if code:
        sys.exit(code)
