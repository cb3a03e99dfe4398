"""SIGTERM and SIGINT (Ctrl-C) as a request to save at the end of the step; a Ctrl-C after that stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Preemption:
    """Notes the signal; the trainer asks for it at the end of each step.

    Attributes:
        signal: name of the first signal, such as SIGTERM; empty while none came.
    """

    def __init__(self) -> None:
        self.signal = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle both signals inside the block, and as before after it. Does nothing outside of the main thread."""
        self.signal = ""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = signal.Signals(number).name
            # Not the log, nor a buffered stream: the signal may have come in the middle of a write to either.
            os.write(2, f"\n{self.signal}: saving at the end of this step; Ctrl-C stops at once\n".encode())
