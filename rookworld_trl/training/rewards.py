"""Between the reward functions and the advantages: what is no number is left out, what is absurd is cut, all counted.

One infinite reward would make its group's mean infinite and, with `scale_rewards="none"`, its advantages as large as
float32 goes. And a reward function that raises in one process would leave the others waiting for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.modeling.completions import completion_texts

logger = logging.get_logger(__name__)


class RewardCaller:
    """Rewards of a batch by texts that hide nothing: TRL's leave special tokens out and don't say whether they ended.

    Args:
        args: the configuration.
        accelerator: processes fail together.
        tokenizer: makes the texts.
        eos_token_ids: tokens that end a completion.
        weights: (functions,), of each function's rewards.
    """

    def __init__(
        self, args: Any, accelerator: Any, tokenizer: Any, eos_token_ids: Sequence[int], weights: torch.Tensor
    ):
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.eos_token_ids, self.weights = eos_token_ids, weights

    def combined(self, per_function: torch.Tensor) -> torch.Tensor:
        """One reward (N,) for each completion, from those of the functions (N, functions)."""
        return combine_rewards(per_function, self.weights.to(per_function.device))

    def __call__(
        self, calculate: Callable[..., torch.Tensor], rows: list[dict[str, Any]], completion_ids: Any, functions: int
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """See `screened`.

        Args:
            calculate: TRL's `_calculate_rewards`.
            functions: how many there are.

        Raises:
            Exception: what a reward function raised, in its own process; the others raise a RuntimeError with its
                traceback at the same time.
        """
        error, prompts = None, [row["prompt"] for row in rows]
        completions: list[Any] = completion_texts(self.tokenizer, completion_ids, self.eos_token_ids)
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):  # a conversation, which the completion continues
                completions[number] = [{"role": "assistant", "content": completions[number]}]
        try:
            rewards = calculate(rows, prompts, completions, completion_ids)
        except Exception as raised:
            # TRL gathers the rewards at its end: there the others are waiting.
            blank = torch.full((len(rows), functions), torch.nan, device=self.accelerator.device)
            error, rewards = raised, gather(blank)
        ranks.fail_together(error, "a reward function")
        return screened(rewards, self.args.reward_limit)


def combine_rewards(per_function: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum (N,) of the rewards (N, F) that apply; NaN where none does."""
    total = (per_function * weights).nansum(dim=1)
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
