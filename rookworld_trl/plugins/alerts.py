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
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any
from urllib.request import Request, urlopen

from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds


@dataclass
class Alerts(Plugin):
    """Sends what the run tells to `alert`, with the time. A command is split as a shell does and run without one.

    Raises:
        ValueError: an empty command, or one whose quotes do not match.
    """

    NAME = "alerts"
    ANY_TRAINER = True

    alert: str | None = option(
        None,
        "A command, or an http(s) address: told as JSON (on stdin, or as a POST) when a band turns red and when "
        "training ends. A failure of it is a warning.",
    )

    def __post_init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.url = self.on and str(self.alert).startswith(("http://", "https://"))
        problem = "it is empty"
        try:
            self.command = shlex.split(self.alert or "")
        except ValueError as error:
            self.command, problem = [], str(error)
        if self.on and not self.url and not self.command:
            raise ValueError(
                f"`alert` is {self.alert!r}: {problem}. Write a command with its arguments, or an address that begins "
                "with http:// or https://."
            )

    @property
    def on(self) -> bool:
        return self.alert is not None

    def told(self, event: Mapping[str, Any]) -> None:
        """Send an event of JSON values; the end of a run waits until what has been sent has arrived, or failed."""
        body = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event}, default=str)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=self._send, args=(body,), daemon=True))
        self._threads[-1].start()
        if event["event"] == "end":
            self.wait()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT + 5)  # it has to be ended, too

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
        request = Request(str(self.alert), body.encode(), {"Content-Type": "application/json"}, method="POST")
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
