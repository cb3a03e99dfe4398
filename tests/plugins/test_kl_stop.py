"""A run whose policy leaves its reference ends, with a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rookworld_trl.plugins.kl_stop import KLStop
from rookworld_trl.training import RookWorldGRPOTrainer

Make = Callable[..., RookWorldGRPOTrainer]


def test_stop_is_graceful(make_trainer: Make, options: dict[str, Any]) -> None:
    trainer = make_trainer(kl_stop_threshold=1e-3, learning_rate=1e-2, max_steps=6)
    trainer.train()
    step = trainer.state.global_step
    assert step == 2  # the first step starts at the reference; the second measures what the first one did
    assert "kl_stop_threshold" in trainer.stop_reason
    assert "above 0.001" in trainer.stop_reason
    assert {"step": step, "stop_reason": trainer.stop_reason} in trainer.state.log_history
    saved = json.loads((Path(options["output_dir"]) / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert {"step": step, "stop_reason": trainer.stop_reason} in saved["log_history"]


def test_stop_by_hand() -> None:
    """One of 20 completions is far away: mean and 95th percentile are below the threshold, until there are two."""
    kl = torch.zeros(20)
    kl[0] = 90.0
    stop = KLStop(50.0)
    stop.observe(kl)  # 4.5, and 90 x 0.05: position 18.05 of the sorted values
    assert stop.reason == ""
    kl[1] = 90.0
    stop.observe(kl)
    assert stop.reason.startswith("kl_stop_threshold: 95th percentile of the KL to the reference is 90 nats")
    nan = KLStop(50.0)
    nan.observe(torch.tensor([float("nan"), 0.0]))
    assert nan.reason
    assert not KLStop(0.0).on
    assert KLStop().threshold == 50
