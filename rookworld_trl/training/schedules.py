"""Learning-rate curves beyond transformers' own, and a learning rate that answers to the KL."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.checkpointing.resume import scale_learning_rate
from rookworld_trl.checkpointing.state import Remembers

LR_SCHEDULES = ("transformers", "advanced")
LR_CONTROLS = ("fixed", "kl")
# `RateControl` moves fast down, for a run that leaves its reference is soon lost; slowly up, or the two would swing.
RATE_DOWN, RATE_UP, RATE_FLOOR = 0.5, 1.1, 0.1


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


def advanced_scheduler(optimizer: Optimizer, total: int, args: Any) -> LambdaLR:
    """`advanced_schedule` over the peak rates of `optimizer`; an `lr_decay_steps` below 1 is a share of `total`.

    Args:
        args: a `RookWorldGRPOConfig`.

    Raises:
        ValueError: warm-up and decay leave no room for the cosine.
    """
    warmup, decay = args.get_warmup_steps(total), args.lr_decay_steps
    # A share of a run of two steps, to try a recipe, leaves what the warm-up does not take.
    steps = min(math.ceil(total * decay), max(0, total - warmup)) if decay < 1 else int(decay)
    if warmup + steps > total:
        raise ValueError(
            f"`warmup_steps` ({warmup}) and `lr_decay_steps` ({steps}) exceed the run's {total} optimizer steps: "
            "lower one of them, or train longer"
        )
    curve = partial(advanced_schedule, total=total, warmup=warmup, decay=steps, floor=args.lr_floor)
    return LambdaLR(optimizer, curve)


@dataclass
class RateControl(Remembers, TrainerCallback):
    """Multiplies the schedule: down where the KL has been above its band for some steps in a row, up again slowly.

    It stands beside the control of beta: that pulls the policy back, this makes its steps smaller.

    Attributes:
        patience: optimizer steps in a row that must agree, each time.
        scale: share of the schedule in force, `RATE_FLOOR` to 1. The rates themselves are in the optimizer and its
            schedule, which checkpoints hold: a resumed run goes on with the same ones.
        above, within: steps in a row so far.
    """

    REMEMBERED = ("scale", "above", "within")
    COUNTERS = ("above", "within")  # what goes back with an undone step; the rates in force stay, and so their scale

    patience: int
    scale: float = 1.0
    above: int = 0
    within: int = 0

    def observe(self, kl: float, highest: float) -> None:
        """Count one optimizer step by its mean KL; NaN and Inf say nothing.

        Args:
            highest: the upper end of the band, in the same units.
        """
        if not math.isfinite(kl):
            return
        self.above, self.within = (self.above + 1, 0) if kl > highest else (0, self.within + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Move the rates, if enough steps have agreed; before anybody takes a snapshot of the counters."""
        wanted = self.scale
        if self.above >= self.patience:
            wanted, self.above = max(RATE_FLOOR, self.scale * RATE_DOWN), 0
        elif self.within >= self.patience:
            wanted, self.within = min(1.0, self.scale * RATE_UP), 0
        if wanted != self.scale:
            scale_learning_rate(parts["optimizer"], parts["lr_scheduler"], wanted / self.scale)
            self.scale = wanted
