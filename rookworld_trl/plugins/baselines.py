"""From rewards to advantages: what a completion is compared with in place of its group's mean.

Baselines of a completion's reward r in a group of G completions of one prompt:

* `group_mean`     the group's mean (GRPO, arXiv 2402.03300), which is TRL's own;
* `leave_one_out`  the mean of the other G - 1 (RLOO, arXiv 2402.14740): unbiased, G / (G - 1) times as large;
* `ema`            a moving average of earlier batches' rewards, per task (REINFORCE, Williams 1992): also learns from
                   groups whose rewards all agree.

All work on the rewards of the whole global batch, so they do not depend on how many processes share it. A NaN reward
(no reward function applies) is left out of every mean and gets advantage 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rookworld_trl import ranks
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin, Row

DECAY = 0.9  # share of the old average kept at each batch
_EPSILON = 1e-4  # TRL's, in the same place
_AGREED = 1e-6  # rewards that deviate less are equal up to rounding


def scale_advantages(advantages: torch.Tensor, rewards: torch.Tensor, num_generations: int, scale: str) -> torch.Tensor:
    """Divide by the rewards' standard deviation in the `group`, in the `batch`, or by nothing (`none`); NaN becomes 0.

    Args:
        advantages, rewards: (N,), groups of `num_generations` in a row.
    """
    if scale == "group":
        deviation = _nanstd(rewards.view(-1, num_generations)).repeat_interleave(num_generations)
    else:
        deviation = _nanstd(rewards[None]).expand_as(rewards)
    if scale != "none":
        # Where all rewards agree there is nothing to divide by, and a running mean may still differ from them.
        advantages = advantages / (deviation + _EPSILON).where(~(deviation < _AGREED), 1.0)
    return advantages.nan_to_num(nan=0.0)


def _nanstd(rows: torch.Tensor) -> torch.Tensor:
    """Standard deviation (with n - 1) of each row (R, K) without its NaN; NaN where fewer than two are left."""
    count = (~rows.isnan()).sum(dim=1)
    squares = (rows - rows.nanmean(dim=1, keepdim=True)).square().nansum(dim=1)
    return (squares / (count - 1).clamp(min=1)).sqrt().masked_fill(count < 2, torch.nan)


@dataclass
class Baselines(Plugin):
    """Puts advantages (B,) against another baseline in place of TRL's.

    Attributes:
        means: the moving averages by task; a task's first batch sets its own, and is then judged by itself.
    """

    NAME = "advantage_baseline"
    STATE = "baseline"
    SAMPLED = True
    UNDONE = True
    REMEMBERED = ("means",)

    advantage_baseline: Literal["group_mean", "leave_one_out", "ema"] = option(
        "group_mean", "What a reward is compared with: group_mean, leave_one_out, or ema."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.means: dict[str, float] = {}

    @property
    def on(self) -> bool:
        return self.advantage_baseline != "group_mean"

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        moving = self.advantage_baseline == "ema"
        if moving and "mining" in others:
            yield (
                "advantage_baseline: with `mining` groups whose rewards agree are dropped, and against a running mean "
                "they teach too: a bias. Leave it at group_mean or leave_one_out, or set `mining` to False"
            )
        if args.multi_objective_aggregation != "sum_then_normalize":
            yield (
                "multi_objective_aggregation: only TRL's group mean can normalise each reward by itself. Set it to "
                "sum_then_normalize, or `advantage_baseline` to group_mean"
            )
        if moving and args.scale_rewards == "group":  # where a group agrees, its deviation is 0
            yield (
                "advantage_baseline: `scale_rewards` is group, and a group's own deviation is no measure of its "
                "distance to a running mean. Set `scale_rewards` to batch or none, or `advantage_baseline` to "
                "group_mean or leave_one_out"
            )

    def compared(self, rewards: torch.Tensor, num_generations: int, tasks: Sequence[str]) -> torch.Tensor:
        """The value each reward is compared with, from averages that do not hold this batch yet; then add it to them.

        Args:
            rewards: (N,), groups of `num_generations` in a row; NaN where no reward applies.
            tasks: the N rows' tasks; rows of one group share theirs.

        Returns:
            (N,); NaN where there is nothing to compare with.
        """
        if self.advantage_baseline == "leave_one_out":
            groups = rewards.view(-1, num_generations)
            count = (~groups.isnan()).sum(dim=1, keepdim=True)
            others = (groups.nansum(dim=1, keepdim=True) - groups.nan_to_num()) / (count - 1)
            return others.masked_fill(count < 2, torch.nan).flatten()
        values = torch.full_like(rewards, torch.nan)
        for task in sorted(set(tasks)):
            chosen = torch.tensor([name == task for name in tasks], device=rewards.device)
            fresh = rewards[chosen].double().nanmean().item()
            if math.isfinite(fresh):
                known = self.means.get(task, fresh)
                values[chosen] = known
                self.means[task] = DECAY * known + (1 - DECAY) * fresh
        return values

    def rewarded(self, rows: list[Row], rewards: torch.Tensor) -> None:
        self.rewards = rewards

    def sampled(self, rows: list[Row], batch: Row) -> None:
        trainer, rewards = self.trainer, self.rewards
        raw = rewards - self.compared(rewards, trainer.num_generations, ranks.everyones(trainer.tasks(rows)))
        scaled = scale_advantages(raw, rewards, trainer.num_generations, trainer.args.scale_rewards)
        batch["advantages"] = scaled[trainer.mine(rows)]
