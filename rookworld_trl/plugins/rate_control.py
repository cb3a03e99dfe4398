"""A learning rate that answers to the KL: down where that has been above its band for some steps, up again slowly."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.checkpointing.resume import scale_learning_rate
from rookworld_trl.settings.parser import option
from rookworld_trl.training.config import NO_KL
from rookworld_trl.training.plugin import Plugin

# Fast down, for a run that leaves its reference is soon lost; slowly up, or the two would swing.
DOWN, UP, FLOOR = 0.5, 1.1, 0.1


@dataclass
class RateControl(Plugin):
    """Multiplies the schedule. It stands beside the control of beta: that pulls back, this makes steps smaller.

    Attributes:
        scale: share of the schedule in force, `FLOOR` to 1. The rates themselves are in the optimizer and its schedule,
            which checkpoints hold: a resumed run goes on with the same ones.
        above, within: steps in a row so far.
    """

    NAME = "lr_control"
    STATE = "rate_control"
    REMEMBERED = ("scale", "above", "within")

    lr_control: Literal["fixed", "kl"] = option(
        "fixed",
        "fixed, or kl: half the learning rate, to a tenth of its schedule at most, each time the KL is above "
        "`kl_target` x `kl_factor` for `kl_interval` steps in a row, and a tenth more when it is not.",
    )
    scale: float = field(default=1.0, init=False)
    above: int = field(default=0, init=False)
    within: int = field(default=0, init=False)

    @property
    def on(self) -> bool:
        return self.lr_control == "kl"

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        if args.beta == 0:
            yield f"lr_control: {NO_KL}"

    def observe(self, kl: float, highest: float) -> None:
        """Count one optimizer step by its mean KL; NaN and Inf say nothing.

        Args:
            highest: the upper end of the band, in the same units.
        """
        if math.isfinite(kl):
            self.above, self.within = (self.above + 1, 0) if kl > highest else (0, self.within + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        trainer = self.trainer
        trainer.record("kl/rate_scale", self.scale)
        if trainer.step_kl is not None:
            self.observe(trainer.step_kl[0], trainer.kl.controller.target * trainer.kl.controller.factor)
        self.move(trainer.args.kl_interval, parts["optimizer"], parts["lr_scheduler"])

    def move(self, patience: int, optimizer: Any, scheduler: Any) -> None:
        """Move the rates, if so many steps in a row have agreed."""
        wanted = self.scale
        if self.above >= patience:
            wanted, self.above = max(FLOOR, self.scale * DOWN), 0
        elif self.within >= patience:
            wanted, self.within = min(1.0, self.scale * UP), 0
        if wanted != self.scale:
            scale_learning_rate(optimizer, scheduler, wanted / self.scale)
            self.scale = wanted
