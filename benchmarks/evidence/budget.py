"""Equal time for every arm: training ends when it is used up, and the rate rises at first and falls to 0 by then.

On a CPU, CPU time rather than the clock: other work on the machine does not shorten an arm's training. With one thread
the two are the same on a quiet machine. On a GPU the clock: CPU time does not see its work.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from benchmarks.common import wait

WARM_UP = 0.05  # of the budget


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended, such as engines."""
    return sum(os.times()[:4])


def seconds_on(device: str) -> float:
    """CPU seconds; on a GPU the clock's, read when it has done what it was given."""
    if device == "cpu":
        return cpu_seconds()
    wait(device)
    return time.perf_counter()


@dataclass
class Budget:
    """Seconds that an arm may train for, and how many it has used.

    Attributes:
        seconds: all of them.
        updates: optimizer steps after which training ends instead, where given: of runs on a machine of another speed,
            which are to be compared with runs that made so many in their time.
        device: whose seconds they are.
        samples: completions that were trained on so far, gold ones included.
        curve: (seconds used, samples) after each step.
    """

    seconds: float
    updates: int | None = None
    device: str = "cpu"
    samples: int = 0
    curve: list[tuple[float, int]] = field(default_factory=list)
    _start: float | None = None

    @property
    def used(self) -> float:
        """Seconds since the first time this was asked for."""
        if self._start is None:
            self._start = seconds_on(self.device)
        return seconds_on(self.device) - self._start

    @property
    def share(self) -> float:
        """How much of the budget is used."""
        used = self.used  # which starts the clock
        return used / self.seconds if self.updates is None else len(self.curve) / self.updates

    @property
    def factor(self) -> float:
        """Of the learning rate, in [0, 1]: it rises over the first twentieth of the budget, then falls to 0 by its end.

        Adam's first steps change every weight by the whole rate, whatever the gradients are.
        """
        share = self.share
        return max(0.0, min((share + 0.01) / WARM_UP, (1 - share) / (1 - WARM_UP)))

    def step(self, samples: int) -> bool:
        """Count a step over `samples` completions; whether the budget is used up."""
        self.samples += samples
        self.curve.append((round(self.used, 2), self.samples))
        return self.share >= 1


class BudgetCallback(TrainerCallback):
    """Applies a budget to any trainer of transformers; give it a constant learning rate and steps without end."""

    def __init__(self, budget: Budget, samples_per_step: int) -> None:
        self.budget, self.samples_per_step = budget, samples_per_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = group["initial_lr"] * self.budget.factor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.budget.step(self.samples_per_step):
            control.should_training_stop = True
