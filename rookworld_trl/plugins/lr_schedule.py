"""A learning-rate curve beyond transformers' own: warm-up, cosine down to a floor, a last decay to 0."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rookworld_trl.checkpointing.resume import lay_schedule_anew
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin


def advanced_schedule(step: int, total: int, warmup: int, decay: int, floor: float) -> float:
    """Linear warm-up to 1, cosine down to `floor`, linear decay to 0 at the very end.

    The warm-up's first update already moves the weights, at 1 / (warmup + 1). The last update, `total - 1`, is the
    last that does: at `total` the factor is 0.

    Args:
        step: updates done so far, which is the number of the coming one.
        total: updates of the whole run.
        warmup: updates of the warm-up.
        decay: updates of the final decay; the cosine fills what lies between.
        floor: where the cosine ends, as a share of the peak.

    Returns:
        Factor of the peak learning rate, 0 to 1.
    """
    cosine_end = total - decay
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step < cosine_end:
        progress = (step - warmup) / (cosine_end - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return floor * max(0, total - step) / decay if decay else floor * (step <= total)


@dataclass
class LRSchedule(Plugin):
    """Puts `advanced_schedule` over the peak rates, in place of the curve that `lr_scheduler_type` names.

    Raises:
        ValueError: warm-up and decay leave no room for the cosine.
    """

    NAME = "lr_schedule"

    lr_schedule: Literal["transformers", "advanced"] = option(
        "transformers", "transformers: `lr_scheduler_type` rules; advanced: warm-up, cosine to `lr_floor`, linear to 0."
    )
    lr_floor: float = option(0.1, "Where the advanced cosine ends, as a share of the peak.", least=0, most=1)
    lr_decay_steps: float = option(
        0.1, "Steps of the advanced schedule's last decay; below 1: a share of the run.", least=0
    )

    @property
    def on(self) -> bool:
        return self.lr_schedule == "advanced"

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        if trainer.args.max_steps > 0:  # else the data says how many, later on
            self.curve(trainer.args.max_steps)

    def curve(self, total: int) -> Any:
        """The factor of the peak rate, by updates done, over so many of them."""
        warmup, decay = self.trainer.args.get_warmup_steps(total), self.lr_decay_steps
        # A share of a run of two steps, to try a recipe, leaves what the warm-up does not take.
        steps = min(math.ceil(total * decay), max(0, total - warmup)) if decay < 1 else int(decay)
        if warmup + steps > total:
            raise ValueError(
                f"`warmup_steps` ({warmup}) and `lr_decay_steps` ({steps}) exceed the run's {total} optimizer steps: "
                "lower one of them, or train longer"
            )
        return partial(advanced_schedule, total=total, warmup=warmup, decay=steps, floor=self.lr_floor)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]
        inner = getattr(scheduler, "scheduler", scheduler)
        rates = [group["lr"] for group in optimizer.param_groups]
        inner.lr_lambdas = [self.curve(state.max_steps)] * len(inner.lr_lambdas)
        lay_schedule_anew(optimizer, scheduler)
        # A resumed run's are what the last step left, to the last bit.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if math.isclose(group["lr"], rate, rel_tol=1e-9):
                group["lr"] = rate
