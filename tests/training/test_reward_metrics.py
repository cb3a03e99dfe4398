"""From the functions' rewards to one a completion, to the share of groups that teach, and to what a table shows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rookworld_trl.training import Plugin, RookWorldGRPOTrainer
from rookworld_trl.training.trainer import combine_rewards, informative_groups

NAN = float("nan")


def test_combine_rewards() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, 2.0], [1.0, 2.0], [NAN, NAN]])
    assert combine_rewards(rewards, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([1, 1, 2, NAN], nan_ok=True)


def test_useful_groups_by_hand() -> None:
    rewards = np.array([1.0, 1.0, 0.0, 1.0, NAN, NAN, NAN, 1.0])
    assert informative_groups(rewards, 2).tolist() == [False, True, False, False]
    assert informative_groups(rewards, 4).tolist() == [True, False]


class PerToken(Plugin):
    """Another advantage for each token."""

    NAME = "per_token"

    def sampled(self, rows: list[Any], batch: dict[str, Any]) -> None:
        batch["advantages"] = torch.rand(batch["completion_mask"].shape)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_table_of_completions_shows_the_advantages_that_are_used(
    make_trainer: Callable[..., RookWorldGRPOTrainer], per_token: bool
) -> None:
    """Of each completion the mean over its tokens."""
    trainer = make_trainer(log_completions=True, max_steps=1)
    trainer.plugins += [PerToken()] if per_token else []
    batches: list[dict[str, Any]] = []
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: batches.append(inner(rows)) or batches[-1]  # type: ignore[method-assign]
    trainer.train()
    used = []
    for row, mask in zip(batches[0]["advantages"], batches[0]["completion_mask"], strict=True):
        used.append((row[mask.bool()] if row.ndim else row).mean().item())
    assert len(set(used)) > 1
    assert list(trainer._logs["advantages"]) == pytest.approx(used)
