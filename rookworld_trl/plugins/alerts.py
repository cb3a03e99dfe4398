"""Tell somebody what happened to a run: a command gets it as JSON on its standard input.

Within `TIMEOUT` seconds, for which the run waits: whatever goes wrong here is a warning, and the run goes on.
"""

import json
import logging
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds


@dataclass
class Alerts(Plugin):
    """Sends what the run tells to `alert`, with the time. It is split as a shell does and run without one.

    Raises:
        ValueError: an empty command, or one whose quotes do not match.
    """

    NAME = "alerts"
    ANY_TRAINER = True

    alert: str | None = option(
        None,
        "A command that is told, as JSON on stdin, when a band turns red and when training ends, such as `curl -sd @- "
        "ADDRESS`. A failure of it is a warning.",
    )

    def __post_init__(self) -> None:
        problem = "it is empty"
        try:
            self.command = shlex.split(self.alert or "")
        except ValueError as error:
            self.command, problem = [], str(error)
        if self.on and not self.command:
            raise ValueError(f"`alert` is {self.alert!r}: {problem}. Write a command with its arguments.")

    @property
    def on(self) -> bool:
        return self.alert is not None

    def told(self, event: Mapping[str, Any]) -> None:
        """Send an event of JSON values."""
        body = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event}, default=str)
        try:
            self._send(body)
        except (OSError, subprocess.SubprocessError) as error:
            # Not in the error's own words, which name the command: that may hold a secret.
            details = (getattr(error, name, None) for name in ("returncode", "strerror"))
            known = ", ".join(str(detail) for detail in details if detail is not None)
            logger.warning(f"an alert could not be sent: {type(error).__name__} ({known or 'no details'}). See `alert`")

    def _send(self, body: str) -> None:
        # A group of its own: a Ctrl-C is not for it.
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        subprocess.run(self.command, input=body, text=True, timeout=TIMEOUT, check=True, **quiet)
