"""Between the reward functions and the advantages: what is no number is left out, what is absurd is cut, all counted.

One infinite reward would make its group's mean infinite and, with `scale_rewards="none"`, its advantages as large as
float32 goes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def combine_rewards(per_function: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum (N,) of the rewards (N, F) that apply; NaN where none does."""
    total = (per_function * weights.to(per_function.device)).nansum(dim=1)
    return total.masked_fill(per_function.isnan().all(dim=1), torch.nan)


def screened(rewards: torch.Tensor, limit: float) -> tuple[torch.Tensor, dict[str, int]]:
    """Rewards (N, functions) within +-limit, NaN where a function gave no finite number.

    Returns:
        Also the counts of completions without any finite reward, and of rewards that were cut, where there are some.
    """
    large = rewards.isfinite() & (rewards.abs() > limit)
    rewards = torch.where(rewards.isinf(), torch.nan, torch.where(large, limit * rewards.sign(), rewards))
    counts = {"not_finite": int(rewards.isnan().all(dim=1).sum()), "clamped": int(large.sum())}
    if any(counts.values()):
        logger.warning(
            f"rewards: {counts['not_finite']} of {len(rewards)} completions have no finite one and are left out, "
            f"{counts['clamped']} are cut to +-{limit:g} (`reward_limit`). Fix the reward function"
        )
    return rewards, {name: count for name, count in counts.items() if count}


def informative_groups(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Which groups (N / samples,) hold different rewards (N,); NaN do not count."""
    groups = rewards.reshape(-1, samples)
    highest = np.where(np.isnan(groups), -np.inf, groups).max(axis=1)
    lowest = np.where(np.isnan(groups), np.inf, groups).min(axis=1)
    return highest - lowest > 1e-6


def informative_share(rewards: torch.Tensor, samples: int) -> float:
    """Share of such groups; the others teach a group baseline nothing."""
    return informative_groups(rewards.cpu().numpy(), samples).mean(dtype=np.float32).item()


def by_task(rewards: torch.Tensor, tasks: Sequence[str], num_generations: int) -> dict[str, float]:
    """Metrics of the combined rewards (N,) of all processes: mean by task, and the share of groups that differ."""
    metrics = {"groups/informative": informative_share(rewards, num_generations)}
    for task in sorted(set(tasks) - {""}):
        own = rewards[torch.tensor([name == task for name in tasks], device=rewards.device)]
        metrics[f"reward/{task}"] = own.nanmean().item()
        metrics[f"groups/informative/{task}"] = informative_share(own, num_generations)
    return metrics
