"""Baselines against numbers worked out by hand, and what of them reaches the loss."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from rookworld_trl.plugins.baselines import Baselines, scale_advantages
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.plugins.conftest import batch_of
from tests.support.plugged import plugin_of

NAN = float("nan")
Make = Callable[..., RookWorldGRPOTrainer]


def values(baseline: Baselines, rewards: list[float], generations: int, tasks: list[str] | None = None) -> list[float]:
    return baseline.compared(torch.tensor(rewards), generations, tasks or ["t"] * len(rewards)).tolist()


def test_leave_one_out() -> None:
    # Others of 0: (1 + 2) / 2; the NaN counts nowhere, and stands against the two others itself.
    own = Baselines("leave_one_out")
    assert values(own, [0.0, 1.0, 2.0, 5.0, 5.0, NAN], 3)[:5] == pytest.approx([1.5, 1, 0.5, 5, 5])
    assert values(own, [NAN, 3.0], 2) == pytest.approx([NAN, NAN], nan_ok=True)


def test_ema_per_task() -> None:
    baseline = Baselines("ema")
    assert values(baseline, [1.0, 3.0, 10.0, 10.0], 2, ["p", "p", "a", "a"]) == [2, 2, 10, 10]  # first: itself
    assert values(baseline, [4.0, 8.0, 0.0, 4.0], 2, ["p", "p", "a", "a"]) == [2, 2, 10, 10]  # second: the first
    # 0.9 * 2 + 0.1 * 6 and 0.9 * 10 + 0.1 * 2; a task that is absent keeps its average
    assert values(baseline, [0.0, 0.0], 2, ["p", "p"]) == pytest.approx([2.4, 2.4])
    assert values(baseline, [0.0, 0.0], 2, ["a", "a"]) == pytest.approx([9.2, 9.2])
    assert values(baseline, [NAN, NAN], 2, ["a", "a"]) == pytest.approx([NAN, NAN], nan_ok=True)
    assert baseline.means["a"] == pytest.approx(8.28)


def test_scale_by_hand() -> None:
    rewards = torch.tensor([0.0, 2.0, 4.0, 4.0])
    advantages = torch.tensor([-1.0, 1.0, 0.0, NAN])
    assert scale_advantages(advantages, rewards, 2, "none").tolist() == [-1, 1, 0, 0]
    group = scale_advantages(advantages, rewards, 2, "group").tolist()
    assert group == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0, 0])
    deviation = ((2.5**2 + 0.5**2 + 1.5**2 + 1.5**2) / 3) ** 0.5
    batch = scale_advantages(advantages, rewards, 2, "batch").tolist()
    assert batch == pytest.approx([-1 / (deviation + 1e-4), 1 / (deviation + 1e-4), 0, 0])


@pytest.mark.parametrize(("kind", "unharmed"), [("leave_one_out", True), ("ema", False)])
def test_dropping_groups_that_agree_is_right_for_group_baselines_alone(kind: str, unharmed: bool) -> None:
    """All 16 groups of four samples that pass with probability 0.2, by their probabilities: does the expected gradient
    (by the logit of passing) of all groups come from those that stay?"""
    chance, gradient = 0.2, {True: 0.0, False: 0.0}
    for outcome in itertools.product((0.0, 1.0), repeat=4):
        rewards = torch.tensor(outcome, dtype=torch.double)
        baseline = Baselines(kind)
        baseline.means = {"x": 0.4}
        advantages = rewards - baseline.compared(rewards, 4, ["x"] * 4)
        probability = math.prod(chance if passed else 1 - chance for passed in outcome)
        gradient[len(set(outcome)) > 1] += probability * float((advantages * (rewards - chance)).sum())
    assert sum(gradient.values()) > 0.3  # 4 p (1 - p) = 0.64, less a quarter of it with the group's own mean
    assert (abs(gradient[False]) < 1e-12) == unharmed


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_our_scaling_is_trls(make_trainer: Make, scale: str) -> None:
    """TRL's own advantages stand by default; ours, of the same rewards, are the same."""
    trainer = make_trainer(scale_rewards=scale)
    batch, rewards = batch_of(trainer)
    compared = rewards - rewards.view(-1, 4).mean(1).repeat_interleave(4)
    assert torch.allclose(scale_advantages(compared, rewards, 4, scale), batch["advantages"], atol=1e-6)


def test_leave_one_out_reaches_the_batch(make_trainer: Make) -> None:
    batch, rewards = batch_of(make_trainer(advantage_baseline="leave_one_out", scale_rewards="none"))
    assert rewards.std() > 0
    for row in range(8):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        others = [rewards[other].item() for other in group if other != row]
        assert batch["advantages"][row].item() == pytest.approx(rewards[row].item() - sum(others) / 3, abs=1e-6)


def test_where_all_rewards_agree_their_distance_to_the_running_mean_stays_what_it_is() -> None:
    rewards = torch.full((4,), 0.7)
    for scale in ("batch", "group"):
        scaled = scale_advantages(rewards - 0.4, rewards, 2, scale)
        assert torch.allclose(scaled, torch.full((4,), 0.3))


def test_ema_goes_by_the_task_column(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=2, advantage_baseline="ema")
    trainer.train_dataset = trainer.train_dataset.add_column("task", ["p", "p", "a", "p", "a", "p", "a", "p"])
    trainer.train()
    assert set(plugin_of(trainer, Baselines).means) == {"a", "p"}
