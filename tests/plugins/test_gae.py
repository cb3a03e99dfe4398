"""GAE and its value head against numbers worked out by hand, and in a run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rookworld_trl.checkpointing.store import load_tree, save_tree
from rookworld_trl.plugins.gae import GAE, ValueHead, gae
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.plugins.conftest import batch_of
from tests.support.plugged import plugin_of

ONE_PROCESS = SimpleNamespace(reduce=lambda tensor, reduction: tensor)
Make = Callable[..., RookWorldGRPOTrainer]


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


def test_first_gae_advantages_by_hand(make_trainer: Make) -> None:
    """The head starts at 0, so token t of T gets (gamma lambda)^(T - 1 - t) times the reward."""
    batch, rewards = batch_of(make_trainer(use_gae=True, scale_rewards="none", gae_gamma=0.9, gae_lambda=0.5))
    for row in range(8):
        length = int(batch["completion_mask"][row].sum())
        expected = [rewards[row].item() * 0.45 ** (length - 1 - t) for t in range(length)]
        assert batch["advantages"][row, :length].tolist() == pytest.approx(expected, rel=1e-5)
        assert batch["advantages"][row, length:].abs().sum() == 0


def test_gae_scaled_by_the_root_mean_square(make_trainer: Make) -> None:
    batch, _ = batch_of(make_trainer(use_gae=True))
    tokens = batch["advantages"][batch["completion_mask"].bool()]
    assert tokens.square().mean().sqrt().item() == pytest.approx(1, rel=1e-2)


def test_the_value_head_is_saved_beside_the_model(make_trainer: Make, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(use_gae=True, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_tree(Path(options["output_dir"]) / "checkpoint-2", "rookworld_state")["value_head"]["weights"]
    assert all(
        torch.equal(saved[name], tensor) for name, tensor in plugin_of(trainer, GAE).head.net.state_dict().items()
    )
    trainer.save_model(str(tmp_path / "export"))
    assert not (tmp_path / "export" / "rookworld_state.safetensors").exists()
    assert type(trainer.model).from_pretrained(tmp_path / "export").num_parameters() == trainer.model.num_parameters()
