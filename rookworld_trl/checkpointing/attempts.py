"""How often a run has recovered, counted beyond the process, and what that has left of its learning rate."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from rookworld_trl.checkpointing.resume import scale_learning_rate
from rookworld_trl.checkpointing.state import Remembers
from rookworld_trl.files import append_line, write_atomically

logger = logging.get_logger(__name__)

ATTEMPTS_FILE = "recovery.json"
EVENTS_FILE = "recovery.jsonl"
RATE_AFTER_FAULT = 0.5


class Attempts:
    """Recoveries since the last stretch of good steps, in a file that no checkpoint holds or restores.

    A count inside a checkpoint would start at 0 whenever a run dies and resumes, and a run that always dies at the same
    step would go on for ever. What cannot be written is said once and then kept in memory alone: a full disk must not
    end a run that is just being saved.

    Args:
        folder: the run's; None on processes that write nothing.
        fresh: forget what an earlier run in this folder has counted.

    Attributes:
        count: attempts in a row, those of earlier processes included.
        total: all attempts of the run.
    """

    def __init__(self, folder: Path | None, fresh: bool = False):
        self.folder = folder
        self.count = self.total = 0
        if folder is None:
            return
        if fresh:
            with _said_not_raised(folder / ATTEMPTS_FILE):
                (folder / ATTEMPTS_FILE).unlink(missing_ok=True)
            return
        try:
            state = json.loads((folder / ATTEMPTS_FILE).read_text(encoding="utf-8"))
            self.count, self.total = int(state["attempts"]), int(state["total"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            logger.warning(f"{folder / ATTEMPTS_FILE} cannot be read ({error!r}): counting attempts from 0")

    def add(self) -> int:
        """Count one more and return the attempts in a row."""
        self.count, self.total = self.count + 1, self.total + 1
        self._save()
        return self.count

    def reset(self) -> None:
        """The run is healthy again."""
        self.count = 0
        self._save()

    def record(self, event: Mapping[str, Any]) -> None:
        """Append an event to `recovery.jsonl`."""
        if self.folder is None:
            return
        with _said_not_raised(self.folder / EVENTS_FILE):
            append_line(self.folder / EVENTS_FILE, json.dumps(event))

    def _save(self) -> None:
        if self.folder is None:
            return
        with _said_not_raised(self.folder / ATTEMPTS_FILE):
            text = json.dumps({"attempts": self.count, "total": self.total})
            write_atomically(self.folder / ATTEMPTS_FILE, text + "\n")


@contextmanager
def _said_not_raised(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}): make room or fix its permissions; training goes on")


class LearningRateCut(Remembers):
    """The share of the schedule that is left after recoveries; travels in checkpoints, as the cut schedule does.

    Attributes:
        scale: 1 before the first recovery; each halves it, but at most so many times: faults that have nothing to do
            with the rate must not end up switching learning off.
    """

    REMEMBERED = ("scale",)

    def __init__(self, times: int):
        self.floor, self.scale = RATE_AFTER_FAULT**times, 1.0

    def cut(self, optimizer: Any, scheduler: Any) -> None:
        """Lower the rate in force and those the schedule is going to set."""
        lowered = max(self.floor, self.scale * RATE_AFTER_FAULT)
        ratio, self.scale = lowered / self.scale, lowered
        scale_learning_rate(optimizer, scheduler, ratio)
