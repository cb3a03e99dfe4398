"""Baselines and GAE against numbers worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rookworld_trl.checkpointing.state import load_tree, save_tree
from rookworld_trl.training.advantages import Baseline, at_last_token, combine_rewards, gae, scale_advantages
from rookworld_trl.training.value import ValueHead

NAN = float("nan")
ONE_PROCESS = SimpleNamespace(reduce=lambda tensor, reduction: tensor)


def values(baseline: Baseline, rewards: list[float], generations: int, tasks: list[str] | None = None) -> list[float]:
    return baseline(torch.tensor(rewards), generations, tasks or ["t"] * len(rewards)).tolist()


def test_combine_rewards() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, 2.0], [1.0, 2.0], [NAN, NAN]])
    assert combine_rewards(rewards, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([1, 1, 2, NAN], nan_ok=True)


def test_group_mean_and_leave_one_out() -> None:
    rewards = [0.0, 1.0, 2.0, 5.0, 5.0, NAN]
    assert values(Baseline("group_mean"), rewards, 3) == pytest.approx([1, 1, 1, 5, 5, 5])
    # Others of 0: (1 + 2) / 2; the NaN counts nowhere, and stands against the two others itself.
    assert values(Baseline("leave_one_out"), rewards, 3)[:5] == pytest.approx([1.5, 1, 0.5, 5, 5])
    assert values(Baseline("leave_one_out"), [NAN, 3.0], 2) == pytest.approx([NAN, NAN], nan_ok=True)


def test_leave_one_out_is_group_mean_times_g_over_g_minus_1() -> None:
    rewards = torch.rand(12)
    tasks = ["t"] * 12
    plain = rewards - Baseline("group_mean")(rewards, 4, tasks)
    rloo = rewards - Baseline("leave_one_out")(rewards, 4, tasks)
    assert torch.allclose(rloo, plain * 4 / 3, atol=1e-6)


def test_ema_per_task() -> None:
    baseline = Baseline("ema", decay=0.75)
    assert values(baseline, [1.0, 3.0, 10.0, 10.0], 2, ["p", "p", "a", "a"]) == [2, 2, 10, 10]  # first: itself
    assert values(baseline, [4.0, 8.0, 0.0, 4.0], 2, ["p", "p", "a", "a"]) == [2, 2, 10, 10]  # second: the first
    # 0.75 * 2 + 0.25 * 6 and 0.75 * 10 + 0.25 * 2; a task that is absent keeps its average
    assert values(baseline, [0.0, 0.0], 2, ["p", "p"]) == [3, 3]
    assert values(baseline, [0.0, 0.0], 2, ["a", "a"]) == [8, 8]
    assert values(baseline, [NAN, NAN], 2, ["a", "a"]) == pytest.approx([NAN, NAN], nan_ok=True)
    assert baseline.moments["a"].mean == pytest.approx(6)


def test_adaptive_shrinks_by_hand() -> None:
    """Groups (0, 2) and (4, 6): means 1 and 5, within 2, spread of means 8, so tau^2 = 8 - 2 / 2 = 7, w = 7 / 8."""
    baseline = Baseline("adaptive")
    rewards = [0.0, 2.0, 4.0, 6.0]
    assert values(baseline, rewards, 2) == pytest.approx([7 / 8 + 3 / 8] * 2 + [35 / 8 + 3 / 8] * 2)


def test_adaptive_goes_to_its_ends() -> None:
    """Groups that differ only by noise share one baseline; groups without noise keep their own means."""
    assert values(Baseline("adaptive"), [0.0, 2.0, 2.0, 0.0], 2) == pytest.approx([1] * 4)
    assert values(Baseline("adaptive"), [0.0, 0.0, 4.0, 4.0], 2) == pytest.approx([0, 0, 4, 4])
    assert values(Baseline("adaptive"), [3.0, 3.0], 2) == pytest.approx([3, 3])


def test_adaptive_is_nearer_the_truth_than_either_end() -> None:
    """Prompts of known means, 4 noisy rewards each: the baseline's squared error is the smallest of the three."""
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 + 0.2 * torch.randn(4000, generator=generator)
    rewards = (truth[:, None] + 0.4 * torch.randn(4000, 4, generator=generator)).flatten()
    tasks = ["t"] * len(rewards)
    errors = {
        kind: (Baseline(kind)(rewards, 4, tasks).view(-1, 4)[:, 0] - truth).square().mean().item()
        for kind in ("group_mean", "ema", "adaptive")
    }
    assert errors["group_mean"] == pytest.approx(0.04, rel=0.1)
    assert errors["ema"] == pytest.approx(0.04, rel=0.1)
    assert errors["adaptive"] == pytest.approx(0.02, rel=0.1)


def test_baseline_state_survives() -> None:
    baseline = Baseline("adaptive")
    values(baseline, [0.0, 2.0, 4.0, 6.0], 2)
    other = Baseline("adaptive")
    other.load_state_dict(baseline.state_dict())
    assert other.moments == baseline.moments


def test_scale_by_hand() -> None:
    rewards = torch.tensor([0.0, 2.0, 4.0, 4.0])
    advantages = torch.tensor([-1.0, 1.0, 0.0, NAN])
    assert scale_advantages(advantages, rewards, 2, "none").tolist() == [-1, 1, 0, 0]
    group = scale_advantages(advantages, rewards, 2, "group").tolist()
    assert group == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0, 0])
    deviation = ((2.5**2 + 0.5**2 + 1.5**2 + 1.5**2) / 3) ** 0.5
    batch = scale_advantages(advantages, rewards, 2, "batch").tolist()
    assert batch == pytest.approx([-1 / (deviation + 1e-4), 1 / (deviation + 1e-4), 0, 0])


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.8: row 0 has 3 tokens, row 1 has 2; reward only at the end."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    value = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.5, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    # Row 0: deltas 0.5*0.4-0.2 = 0, 0.5*0.6-0.4 = -0.1, 1-0.6 = 0.4
    #   A3 = 0.4; A2 = -0.1 + 0.4*0.4 = 0.06; A1 = 0 + 0.4*0.06 = 0.024
    # Row 1: deltas 0.5*0.5-1 = -0.75, 2-0.5 = 1.5;  A2 = 1.5; A1 = -0.75 + 0.4*1.5 = -0.15
    advantages, returns = gae(rewards, value, mask, 0.5, 0.8)
    assert advantages.flatten().tolist() == pytest.approx([0.024, 0.06, 0.4, -0.15, 1.5, 0])
    assert returns.flatten().tolist() == pytest.approx([0.224, 0.46, 1.0, 0.85, 2.0, 0])


def test_gae_ends() -> None:
    """lambda 1, gamma 1: reward minus value at every token; lambda 0: one-step differences."""
    rewards, value = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.3, 0.5, 0.9]])
    mask = torch.ones(1, 3)
    assert gae(rewards, value, mask, 1.0, 1.0)[0].flatten().tolist() == pytest.approx([0.7, 0.5, 0.1])
    assert gae(rewards, value, mask, 1.0, 0.0)[0].flatten().tolist() == pytest.approx([0.2, 0.4, 0.1])


def test_at_last_token() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert at_last_token(torch.tensor([5.0, 6.0, 7.0]), mask).tolist() == [[0, 5, 0], [0, 0, 6], [0, 0, 0]]


def test_value_head_learns_and_survives(tmp_path: Path) -> None:
    """It starts at 0, fits a function of its states, ignores what is masked, and comes back from disk."""
    torch.manual_seed(0)
    states = torch.randn(16, 5, 8)
    returns = torch.tanh(states[..., 0])
    mask = torch.ones(16, 5)
    mask[:, 4] = 0
    returns[:, 4] = 1e6
    head = ValueHead(8, 16, 1e-2, 50, seed=1)
    assert head.values(states).abs().max() == 0
    errors = [head.fit(states, returns, mask, ONE_PROCESS) for _ in range(5)]
    assert errors[0] == pytest.approx(returns[:, :4].square().mean().item(), rel=1e-5)
    assert errors[-1] < 0.05 * errors[0]
    save_tree(tmp_path, "head", head.state_dict())
    other = ValueHead(8, 16, 1e-2, 50, seed=2)
    other.load_state_dict(load_tree(tmp_path, "head"))
    assert torch.equal(head.values(states), other.values(states))
    assert head.fit(states, returns, mask, ONE_PROCESS) == other.fit(states, returns, mask, ONE_PROCESS)
    assert torch.equal(head.values(states), other.values(states))
    with pytest.raises(ValueError, match=r"(?s)the value head cannot be restored .* resume from"):
        ValueHead(8, 4, 1e-2, 1, seed=1).load_state_dict(head.state_dict())


def test_value_head_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ValueHead(8, 16, 1e-2, 1, seed=1)
    assert torch.equal(torch.rand(3), expected)
