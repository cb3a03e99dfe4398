"""From rewards to advantages: what a completion is compared with in place of its group's mean.

Baselines of a completion's reward r in a group of G completions of one prompt:

* `group_mean`     the group's mean (GRPO, arXiv 2402.03300), which is TRL's own;
* `leave_one_out`  the mean of the other G - 1 (RLOO, arXiv 2402.14740): unbiased, G / (G - 1) times as large;
* `ema`            a moving average of earlier batches' rewards, per task (REINFORCE, Williams 1992): also learns from
                   groups whose rewards all agree;
* `adaptive`       between the two, weighed by how much of the spread of group means is real: the empirical-Bayes mean
                   w * group_mean + (1 - w) * ema, w = tau^2 / (tau^2 + sigma^2 / G), with sigma^2 the variance inside
                   groups and tau^2 that between prompts (Efron and Morris 1975); both are moving averages, per task.

All work on the rewards of the whole global batch, so they do not depend on how many processes share it. A NaN reward
(no reward function applies) is left out of every mean and gets advantage 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rookworld_trl import ranks
from rookworld_trl.checkpointing.state import Stateful
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin, Row

Kind = Literal["group_mean", "leave_one_out", "ema", "adaptive"]
_EPSILON = 1e-4  # TRL's, in the same place
_AGREED = 1e-6  # rewards that deviate less are equal up to rounding


@dataclass
class Moments:
    """Moving averages of one task's rewards."""

    mean: float
    within: float
    between: float


@dataclass
class Baseline:
    """The baseline of `kind`, with the moving averages that `ema` and `adaptive` carry from batch to batch.

    Attributes:
        kind: see the module.
        decay: share of the old average kept at each batch.
        moments: by task; a task's first batch sets them, and is then judged by itself.
    """

    kind: str = "group_mean"
    decay: float = 0.9
    moments: dict[str, Moments] = field(default_factory=dict)

    def __call__(self, rewards: torch.Tensor, num_generations: int, tasks: Sequence[str]) -> torch.Tensor:
        """The value each reward is compared with, from averages that do not hold this batch yet; then add it to them.

        Args:
            rewards: (N,), groups of `num_generations` in a row; NaN where no reward applies.
            tasks: the N rows' tasks; rows of one group share theirs.

        Returns:
            (N,); NaN where there is nothing to compare with.
        """
        groups = rewards.view(-1, num_generations)
        count = (~groups.isnan()).sum(dim=1, keepdim=True)
        group_mean = groups.nanmean(dim=1, keepdim=True)
        if self.kind == "group_mean":
            return group_mean.expand_as(groups).flatten()
        if self.kind == "leave_one_out":
            others = (groups.nansum(dim=1, keepdim=True) - groups.nan_to_num()) / (count - 1)
            return others.masked_fill(count < 2, torch.nan).flatten()
        values = torch.empty_like(group_mean)
        group_tasks = tasks[::num_generations]
        for task in sorted(set(group_tasks)):
            chosen = torch.tensor([name == task for name in group_tasks], device=rewards.device)
            fresh = _measure(groups[chosen])
            if fresh is None:
                values[chosen] = torch.nan
                continue
            known = self.moments.get(task, fresh)
            if self.kind == "ema":
                values[chosen] = known.mean
            else:
                noise = known.within / count[chosen].clamp(min=1)
                weight = torch.where(noise + known.between > 0, known.between / (noise + known.between), 1.0)
                values[chosen] = weight * group_mean[chosen] + (1 - weight) * known.mean
            self.moments[task] = Moments(
                *(self.decay * getattr(known, name) + (1 - self.decay) * getattr(fresh, name) for name in _NAMES)
            )
        return values.expand_as(groups).flatten()

    def state_dict(self) -> dict[str, Any]:
        return {task: vars(moments) for task, moments in self.moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = {task: Moments(**moments) for task, moments in state.items()}


_NAMES = ("mean", "within", "between")


def _measure(groups: torch.Tensor) -> Moments | None:
    """Mean, variance inside groups and variance between the groups' true means, of one task's groups (P, G)."""
    count = (~groups.isnan()).sum(dim=1)
    groups, count = groups[count > 0].double(), count[count > 0]
    if not len(groups):
        return None
    means = groups.nanmean(dim=1)
    squares = (groups - means[:, None]).square().nansum()
    within = (squares / (count - 1).sum().clamp(min=1)).item()
    spread = means.var().item() if len(means) > 1 else 0.0
    between = max(0.0, spread - within * (1 / count).mean().item())
    return Moments(groups.nanmean().item(), within, between)


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
    """Puts advantages (B,) against another baseline in place of TRL's."""

    NAME = "advantage_baseline"
    STATE = "baseline"

    advantage_baseline: Kind = option(
        "group_mean", "What a reward is compared with: group_mean, leave_one_out, ema, or adaptive."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.baseline = Baseline(self.advantage_baseline)

    @property
    def on(self) -> bool:
        return self.advantage_baseline != "group_mean"

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        moving = self.advantage_baseline in ("ema", "adaptive")
        if moving and "mining" in others:
            yield (
                "advantage_baseline: with `mining` groups whose rewards agree are dropped, and against a running mean "
                "they teach too: a bias. Leave it at group_mean or leave_one_out, or set `mining` to False"
            )
        if args.objective != "sampled":
            yield (
                f"advantage_baseline: `objective` is {args.objective}, and the points of a completion say what each "
                "alternative earns, so nothing is compared. Leave it at group_mean"
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

    def undone(self) -> Stateful:
        return self

    def rewarded(self, rows: list[Row], rewards: torch.Tensor) -> None:
        self.rewards = rewards

    def sampled(self, rows: list[Row], batch: Row) -> None:
        trainer, rewards = self.trainer, self.rewards
        raw = rewards - self.baseline(rewards, trainer.num_generations, ranks.everyones(trainer.tasks(rows)))
        scaled = scale_advantages(raw, rewards, trainer.num_generations, trainer.args.scale_rewards)
        batch["advantages"] = scaled[trainer.mine(rows)]

    def state_dict(self) -> dict[str, Any]:
        return self.baseline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)
