"""A curriculum in stages: each has rows of its own, and gives way to the next at a step, or once enough passes.

Nothing here knows what the stages differ in: their rows have been laid out before, batch by batch, as if each stage
were to last for the whole run. A batch is dealt from the first stage's rows; those of the present stage at the same
places are put in their stead. So a run that is resumed meets the rows that it would have met.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from rookworld_trl.training.plugin import Plugin, Row

logger = logging.get_logger(__name__)

PLACE_COLUMN = "place"  # where a row stands in its stage
WINDOW = 10  # batches whose pass rate decides: of one batch it is a matter of luck
PASS_REWARD = 1.0  # from which on a completion passes

End = tuple[int | None, float | None]


class Stages(Plugin):
    """Which stage a run is in.

    Args:
        dataset: the rows of all stages, one stage after the other, equally many of each, with their places in the
            column `PLACE_COLUMN`.
        ends: of each stage but the last, when it is over: after so many optimizer steps of the run, or when so large a
            share of the completions of its last `WINDOW` batches passed; None for neither.

    Attributes:
        number: of the present stage, from 0.
        recent: pass rates of the present stage's last batches.

    Raises:
        ValueError: rows that are not those of so many stages.
    """

    NAME = "stages"
    SOURCE = True
    REMEMBERED = ("number", "recent")

    def __init__(self, dataset: Any, ends: Sequence[End]):
        self.dataset, self.ends = dataset, list(ends)
        self.size, left = divmod(len(dataset), len(self.ends) + 1)
        if left or PLACE_COLUMN not in dataset.column_names:
            raise ValueError(
                f"the data set has {len(dataset)} rows, which are not those of {len(self.ends) + 1} stages, as "
                f"many of each, with their `{PLACE_COLUMN}`"
            )
        self.number = 0
        self.recent: list[float] = []

    def rows(self, rows: list[Row]) -> None:
        """Go on to the stage that is due, and put its rows in place of those dealt."""
        step = self.trainer.state.global_step
        while self.number < len(self.ends):
            last_step, pass_rate = (math.inf if each is None else each for each in self.ends[self.number])
            passed = sum(self.recent) / WINDOW if len(self.recent) == WINDOW else -1.0
            if step < last_step and passed < pass_rate:
                break
            self.number, self.recent = self.number + 1, []
            logger.warning(f"step {step}: stage {self.number + 1} of {len(self.ends) + 1} begins")
        known: dict[int, Row] = {}
        for number, row in enumerate(rows):
            place = row[PLACE_COLUMN]
            if place not in known:
                known[place] = self.dataset[self.number * self.size + place]
            rows[number] = known[place]
        self.trainer.record("curriculum/stage", self.number + 1)

    def rewarded(self, rows: list[Row], rewards: torch.Tensor) -> None:
        """Remember how the present batch fared."""
        scored = rewards[~rewards.isnan()]
        if len(scored):
            self.recent = [*self.recent, (scored >= PASS_REWARD - 1e-6).double().mean().item()][-WINDOW:]
