"""From rewards to advantages: what a completion is compared with, and generalised advantage estimation.

Baselines of a completion's reward r in a group of G completions of one prompt:

* `group_mean`     the group's mean (GRPO, arXiv 2402.03300);
* `leave_one_out`  the mean of the other G - 1 (RLOO, arXiv 2402.14740): unbiased, G / (G - 1) times as large;
* `ema`            a moving average of earlier batches' rewards, per task (REINFORCE, Williams 1992): also learns from
                   groups whose rewards all agree;
* `adaptive`       between the two, weighed by how much of the spread of group means is real: the empirical-Bayes mean
                   w * group_mean + (1 - w) * ema, w = tau^2 / (tau^2 + sigma^2 / G), with sigma^2 the variance inside
                   groups and tau^2 that between prompts (Efron and Morris 1975); both are moving averages, per task.

All work on the rewards of the whole global batch, so they do not depend on how many processes share it. A NaN reward
(no reward function applies) is left out of every mean and gets advantage 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

BASELINES = ("group_mean", "leave_one_out", "ema", "adaptive")
_EPSILON = 1e-4  # TRL's, in the same place
_AGREED = 1e-6  # rewards that deviate less are equal up to rounding


def combine_rewards(per_function: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum (N,) of the rewards (N, F) that apply; NaN where none does."""
    total = (per_function * weights).nansum(dim=1)
    return total.masked_fill(per_function.isnan().all(dim=1), torch.nan)


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
        kind: one of `BASELINES`.
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


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equations 11 and 16).

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token.

    Args:
        rewards, values: (B, C), reward received with token t, and value of the state before it.
        mask: (B, C), 1 for tokens; they come first in each row.

    Returns:
        Advantages and returns A + V, both (B, C), 0 where masked.
    """
    mask = mask.to(values.dtype)
    values = values * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], following = running, values[:, t]
    return advantages, (advantages + values) * mask


def at_last_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Place one reward per completion (B,) at its last token (B, C); a completion without tokens gets none."""
    last = mask.sum(dim=1).long() - 1
    placed = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    rows = torch.nonzero(last >= 0)[:, 0]
    placed[rows, last[rows]] = rewards[rows]
    return placed
