"""A limit of training's time, and a learning rate that has fallen when it is over.

Without it a slow machine would stop while the rate is high, where most of what was learned is not yet to be seen. The
schedule is followed by steps or by the clock, whichever is further: after its warm-up, whose steps are Adam's, the rest
of the curve belongs to the rest of the time. A machine that makes all steps in time follows it by steps alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.checkpointing.resume import lay_schedule_anew
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin


@dataclass
class TimeLimit(Plugin):
    """Ends training after the step in which the time is over, that before restarts included.

    Attributes:
        seconds: of training, until the end of the last step. A checkpoint holds them, so that a resumed run goes on
            with the time that is left.
        warm: of these, until the end of the warm-up.
        place: where on the schedule the coming step stands, in steps; the rates of the last one are the optimizer's.

    Raises:
        ValueError: no time at all.
    """

    NAME = "max_train_minutes"
    REMEMBERED = ("seconds", "warm", "place")

    max_train_minutes: float | None = option(
        None,
        "Stop training after the step in which this time is over; a learning rate that follows a curve has gone "
        "through all of it by then.",
    )

    def __post_init__(self) -> None:
        if self.max_train_minutes is not None and not self.max_train_minutes > 0:
            raise ValueError(f"`max_train_minutes` is {self.max_train_minutes}: it must be above 0, or left out")
        self.seconds, self.warm, self.place = 0.0, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.started = time.perf_counter() - self.seconds
        scheduler = getattr(parts["lr_scheduler"], "scheduler", parts["lr_scheduler"])
        if self.max_train_minutes is not None and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [self._by_the_clock(curve) for curve in scheduler.lr_lambdas]

    def _by_the_clock(self, curve: Callable[[Any], float]) -> Callable[[float], float]:
        return lambda step: curve(max(step, self.place))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        clock = [time.perf_counter() - self.started]
        broadcast_object_list(clock)  # clocks differ between processes, the decision must not
        self.seconds = clock[0]
        if self.max_train_minutes is None:
            return
        limit, warmup, step = 60 * self.max_train_minutes, args.get_warmup_steps(state.max_steps), state.global_step
        if self.seconds >= limit:
            control.should_training_stop = True
            if getattr(args, "metric_for_best_model", None):  # the last step may be the best
                control.should_evaluate = control.should_save = True
        elif step <= warmup:
            self.warm = self.seconds
        else:
            share = (self.seconds - self.warm) / (limit - self.warm)
            self.place = max(step, warmup + (state.max_steps - warmup) * share)
            if self.place > step:
                lay_schedule_anew(parts["optimizer"], parts["lr_scheduler"])
