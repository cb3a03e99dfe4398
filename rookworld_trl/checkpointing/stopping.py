"""How a run ends: signals and exit codes; and that one run at a time is at work in a folder.

What the exit code of a training program says, so that a scheduler or a shell loop can decide what to do next:

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

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.files import check_output_dir
from rookworld_trl.settings.parser import EXIT_BAD_INPUT

logger = logging.get_logger(__name__)

DONE = 0
CRASHED = 1
BAD_INPUT = EXIT_BAD_INPUT
DIVERGED = 3
UNRECOVERABLE = 4
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
INTERRUPTED = 130  # 128 + SIGINT, as shells say it

# From schedulers and operators; from Ctrl-C; what Slurm's users ask for.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOCK_FILE = ".lock"


# Programs


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
            code = getattr(error, "exit_code", UNRECOVERABLE if isinstance(error, OSError) else CRASHED)
            if code == CRASHED:
                traceback.print_exception(error)
            print(f"error: {name}: {error}", file=sys.stderr)
            self.code = self.code or code
        else:
            self.done.append(name)


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
    ranks.close_process_group()
    if code:
        sys.exit(code)


# Signals


class Preemption:
    """Notes a signal that asks the run to end; the trainer asks for it at the end of each step, and saves.

    A Ctrl-C after another signal ends the program without saving; the others may come as often as they like.

    Attributes:
        signal: name of the first signal, such as SIGTERM; empty while none came.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._watching = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals inside the block, and as before after it.

        Inside another such block, and outside of the main thread, it does nothing.
        """
        if self._watching or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal, self._watching = "", True
        numbers = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]  # as in the background
        previous = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._watching = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, bool(self.signal)
        self.signal = self.signal or name
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if (
            not again
        ):  # not by the log, nor a buffered stream: the signal may have come in the middle of a write to either
            with suppress(OSError):
                os.write(2, f"\n{name}: finishing this step and saving; Ctrl-C ends at once, without saving\n".encode())


# One run at a time in a folder: two would delete and rename each other's checkpoints


class FolderInUseError(ValueError):
    """Another run is at work in the folder."""

    exit_code = BAD_INPUT


_held: dict[Path, FileLock] = {}  # this process's locks by folder


@contextmanager
def locked(output_dir: str | Path, main: bool = True) -> Iterator[None]:
    """Keep other runs out of the folder inside the block; every process of a run must call this.

    A process that holds the lock may take it again. It goes with the process, however that ends.

    Args:
        main: whether this process is the one that takes it.

    Raises:
        FolderInUseError: another run holds it.
        ValueError: nothing can be written there.
    """
    folder = Path(output_dir).resolve()
    ours = ranks.decided(main, lambda: folder not in _held and _take(folder))
    try:
        yield
    finally:
        if main and ours:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            _held.pop(folder).release()


def _take(folder: Path) -> bool:
    check_output_dir(folder)
    lock = _held[folder] = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        del _held[folder]
        raise FolderInUseError(
            f"`output_dir` is {str(folder)!r}: another run is at work there. Wait for it, stop it, or choose another"
        ) from error
    except OSError as error:
        logger.warning(f"{folder}: its file system has no locks ({error}); start no second run there")
    return True
