"""Between the reward functions and the advantages: what is no number is left out, what is absurd is cut, all counted.

One infinite reward would make its group's mean infinite and, with `scale_rewards="none"`, its advantages as large as
float32 goes. And a reward function that raises on one process would leave the others waiting for it.
"""

import functools
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging
from trl.trainer.utils import is_async_callable

logger = logging.get_logger(__name__)


class RewardScreen:
    """Screens the rewards of one generation batch.

    Args:
        limit: rewards beyond +-limit count as the limit.

    Attributes:
        numbers: rewards that were given (not None).
        not_finite: those of them that are NaN or Inf; they become None, as if the function did not apply.
        clamped: those beyond the limit.
        example: where the first one stood.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.numbers = self.not_finite = self.clamped = 0
        self.example = ""

    def wrap(self, function: Any, name: str) -> Any:
        """The function with its results screened; reward models, which are modules, stay as they are."""
        if isinstance(function, nn.Module):
            return function
        if is_async_callable(function):

            @functools.wraps(function, updated=())
            async def screened(*args: Any, **kwargs: Any) -> list[float | None]:
                return self.screen(await function(*args, **kwargs), name)

            return screened

        @functools.wraps(function, updated=())
        def screened_now(*args: Any, **kwargs: Any) -> list[float | None]:
            return self.screen(function(*args, **kwargs), name)

        return screened_now

    def screen(self, rewards: Any, name: str) -> list[float | None]:
        """One function's rewards as finite floats within the limit, None where it gave no usable number.

        Raises:
            TypeError: no sequence, or something in it that is no number.
        """
        try:
            values = list(rewards)
        except TypeError:
            raise TypeError(
                f"the reward function '{name}' returned {type(rewards).__name__}: return a list with one number, or "
                "None, for each completion"
            ) from None
        return [self._one(value, name, row) for row, value in enumerate(values)]

    def _one(self, value: Any, name: str, row: int) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except OverflowError:  # a whole number that no float holds
            number = math.inf
        except (TypeError, ValueError):
            raise TypeError(
                f"the reward function '{name}' returned {value!r} for completion {row}: return a number, or None where "
                "it does not apply"
            ) from None
        self.numbers += 1
        if not math.isfinite(number):
            self.not_finite += 1
            self._note(f"'{name}' gave {number} for completion {row}")
            return None
        if abs(number) > self.limit:
            self.clamped += 1
            self._note(f"'{name}' gave {number:g} for completion {row}")
            return math.copysign(self.limit, number)
        return number

    def screen_tensor(self, rewards: torch.Tensor) -> torch.Tensor:
        """The same for rewards (N, F) that no wrapper saw: those of reward models."""
        infinite, large = rewards.isinf(), rewards.isfinite() & (rewards.abs() > self.limit)
        return torch.where(infinite, torch.nan, torch.where(large, self.limit * rewards.sign(), rewards))

    def _note(self, example: str) -> None:
        self.example = self.example or example


def share_outcome(screen: RewardScreen, error: Exception | None) -> tuple[int, int]:
    """Tell all processes how the rewards went; every process must call this, after its last other collective.

    Returns:
        Rewards not finite, and clamped, over all processes.

    Raises:
        Exception: `error` itself, with its traceback, on the process that it happened on.
        RuntimeError: on the other processes, with that traceback as text.
    """
    text = "".join(traceback.format_exception(error)) if error is not None else ""
    mine = (text, screen.numbers, screen.not_finite, screen.clamped, screen.example)
    everyone = gather_object([mine])
    if error is not None:
        raise error
    for rank, (failure, *_) in enumerate(everyone):
        if failure:
            raise RuntimeError(f"a reward function failed on process {rank}; its traceback:\n{failure}")
    numbers, not_finite, clamped = (sum(each[i] for each in everyone) for i in (1, 2, 3))
    if not_finite or clamped:
        example = next(each[4] for each in everyone if each[4])
        logger.warning(
            f"rewards: {not_finite} of {numbers} not finite and left out, {clamped} cut to +-{screen.limit:g} "
            f"(`reward_limit`); the first: {example}. Mend the reward function"
        )
    return not_finite, clamped


def screened(functions: Sequence[Any], names: Sequence[str], screen: RewardScreen) -> list[Callable[..., Any]]:
    """Each function wrapped by `screen`."""
    return [screen.wrap(function, name) for function, name in zip(functions, names, strict=True)]
