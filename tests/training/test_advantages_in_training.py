"""Baselines and GAE inside a run: what reaches the loss, and what a checkpoint holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rookworld_trl.checkpointing.state import load_tree
from rookworld_trl.training import RookWorldGRPOTrainer
from rookworld_trl.training.advantages import scale_advantages
from rookworld_trl.training.loss import LOSS_TYPES

Make = Callable[..., RookWorldGRPOTrainer]


def batch_of(trainer: RookWorldGRPOTrainer) -> tuple[dict[str, Any], torch.Tensor]:
    """The first generation batch, with each completion's reward."""
    trainer.model.train()
    combined, seen = trainer.rewards.combined, list[torch.Tensor]()
    trainer.rewards.combined = lambda each: seen.append(combined(each)) or seen[-1]
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader()))), seen[-1]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_our_group_mean_is_trls(make_trainer: Make, scale: str) -> None:
    """TRL's own advantages stand by default; ours, computed on the same rewards, are the same."""
    trainer = make_trainer(scale_rewards=scale)
    batch, rewards = batch_of(trainer)
    compared = rewards - trainer.baseline(rewards, 4, [""] * len(rewards))
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
    assert set(trainer.baseline.moments) == {"a", "p"}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gae_trains_with_each_token_loss(make_trainer: Make, loss_type: str) -> None:
    trainer = make_trainer(use_gae=True, loss_type=loss_type, epsilon_high=5.0, learning_rate=1e-2)
    trainer.train()
    assert all(entry["value/error"] >= 0 for entry in trainer.state.log_history if "value/error" in entry)


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
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.value_head.net.state_dict().items())
    trainer.save_model(str(tmp_path / "export"))
    assert not (tmp_path / "export" / "rookworld_state.safetensors").exists()
    assert type(trainer.model).from_pretrained(tmp_path / "export").num_parameters() == trainer.model.num_parameters()


@pytest.mark.parametrize(
    "settings", [{"use_gae": True}, {"advantage_baseline": "leave_one_out"}, {}], ids=["gae", "baseline", "own"]
)
def test_the_table_of_completions_shows_the_advantages_that_are_used(
    make_trainer: Callable[..., RookWorldGRPOTrainer], settings: dict[str, Any]
) -> None:
    """Of each completion the mean over its tokens."""
    trainer = make_trainer(log_completions=True, max_steps=1, **settings)
    batches: list[dict[str, Any]] = []
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: batches.append(inner(rows)) or batches[-1]  # type: ignore[method-assign]
    trainer.train()
    used = []
    for row, mask in zip(batches[0]["advantages"], batches[0]["completion_mask"], strict=True):
        used.append((row[mask.bool()] if row.ndim else row).mean().item())
    assert len(set(used)) > 1
    assert list(trainer._logs["advantages"]) == pytest.approx(used)
