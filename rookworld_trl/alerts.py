"""Tell somebody what happened to a run: a command gets it as JSON on its standard input, a URL as the body of a POST.

In the background, and within `TIMEOUT` seconds: whatever goes wrong here is a warning, and the run goes on.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any
from urllib.request import Request, urlopen

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds


class Alert:
    """Sends events, none if there is no target.

    Args:
        target: `http://...` or `https://...`, or a command with its arguments, which is split as a shell does and run
            without one.

    Raises:
        ValueError: an empty command, or one whose quotes do not match.
    """

    def __init__(self, target: str | None):
        self.target = target
        self._threads: list[threading.Thread] = []
        self.url = target is not None and target.startswith(("http://", "https://"))
        self.command = [] if target is None or self.url else shlex.split(target)
        if target is not None and not self.url and not self.command:
            raise ValueError("it is empty")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Send an event of JSON values, with the time."""
        if self.target is None:
            return
        body = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event}, default=str)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=self._send, args=(body,), daemon=True))
        self._threads[-1].start()

    def _send(self, body: str) -> None:
        try:
            self._post(body) if self.url else self._run(body)
        except (OSError, ValueError, HTTPException, subprocess.SubprocessError) as error:
            # Not in the error's own words, which name the target: that may hold a secret.
            names = ("returncode", "code", "strerror")
            details = [getattr(each, name, None) for each in (error, getattr(error, "reason", None)) for name in names]
            known = ", ".join(str(detail) for detail in details if detail is not None)
            logger.warning(f"an alert could not be sent: {type(error).__name__} ({known or 'no details'}). See `alert`")

    def _post(self, body: str) -> None:
        request = Request(str(self.target), body.encode(), {"Content-Type": "application/json"}, method="POST")
        with urlopen(request, timeout=TIMEOUT):
            pass

    def _run(self, body: str) -> None:
        # A group of its own: a Ctrl-C is not for it, and what it has started ends with it.
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        with subprocess.Popen(self.command, stdin=subprocess.PIPE, text=True, **quiet) as process:  # type: ignore[call-overload]
            try:
                process.communicate(body, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, self.command[0])

    def wait(self) -> None:
        """Until what has been sent has arrived, or failed."""
        for thread in self._threads:
            thread.join(TIMEOUT + 5)  # it has to be ended, too

    @contextmanager
    def end_of(self, run: str, state: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Send an event `end` when the block ends, however it does: `outcome` says how, `state` tells the rest.

        Args:
            run: its folder.
        """
        outcome = "finished"
        try:
            yield
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            self({"event": "end", "run": run, "outcome": outcome, **state()})
            self.wait()
