"""Signals that ask a run to end: it saves at the end of its step; an evaluation, which can be repeated, ends at once.

SIGTERM comes from schedulers and operators, SIGUSR1 is what Slurm's users ask for as a warning, SIGHUP comes when a
terminal is closed, SIGINT is Ctrl-C. Each first one is answered at once, whatever the process is busy with. A Ctrl-C
after another signal ends the program without saving; the others may come as often as they like.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Preempted(KeyboardInterrupt):
    """Raised by a signal inside of `Preemption.until_signalled`, and caught there."""


class Preemption:
    """Notes the signal; the trainer asks for it at the end of each step.

    Attributes:
        signal: name of the first signal, such as SIGTERM; empty while none came.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._watching = self._at_once = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals inside the block, and as before after it.

        Inside another such block, and outside of the main thread, it does nothing. What is ignored stays so, as SIGHUP
        under `nohup`.
        """
        if self._watching or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal, self._watching = "", True
        numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        # Python runs handlers between its own operations, and one of torch's may take minutes; a byte in this pipe
        # comes at once.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        thread = threading.Thread(target=self._answer, args=(reading,), daemon=True)
        thread.start()
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(wakeup)
            os.write(writing, b"\0")
            thread.join()
            os.close(reading)
            os.close(writing)
            self._watching = False

    def until_signalled(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `work` returns; None if a signal ends it, or has come before it inside of the same `watching`."""
        with self.watching():
            if self.signal:
                return None
            self._at_once = True
            try:
                return work(*args, **kwargs)
            except Preempted:
                return None
            finally:
                self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        second, self.signal = bool(self.signal), self.signal or signal.Signals(number).name
        if number == signal.SIGHUP:
            _leave_terminal()
        if self._at_once:
            raise Preempted
        if second and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _answer(self, reading: int) -> None:
        """Say what is going to happen; in a thread of its own, until it reads a 0."""
        first = True
        while number := os.read(reading, 1)[0]:
            if number not in SIGNALS:
                continue
            if self._at_once:
                text = "stopping"
            elif first:
                text = "finishing this step and saving, which may take a while; Ctrl-C ends at once, without saving"
            elif number == signal.SIGINT:
                text = "ending without saving"
            else:
                continue
            first = False
            say(f"\n{signal.Signals(number).name}: {text}\n")


def say(text: str) -> None:
    """Not by the log, nor a buffered stream: the signal may have come in the middle of a write to either."""
    with suppress(OSError):
        os.write(2, text.encode())


def _leave_terminal() -> None:
    """Let output to a terminal that is gone go nowhere: each write to it would raise, in the middle of a step."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
