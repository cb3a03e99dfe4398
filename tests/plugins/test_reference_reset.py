"""When the policy becomes the reference, and what then is forgotten."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rookworld_trl.plugins.reference_reset import ReferenceReset
from rookworld_trl.training import RookWorldGRPOTrainer

Make = Callable[..., RookWorldGRPOTrainer]


def test_reset_every_n_steps() -> None:
    reset = ReferenceReset(reference_reset_steps=3)
    due = []
    for _ in range(7):
        reset.observe(0.1)
        due.append(reset.due)
        if reset.due:
            reset.steps, reset.history = 0, []
    assert due == [False, False, True, False, False, True, False]


def test_a_kl_that_is_no_number_says_nothing_about_a_stall() -> None:
    """Its step counts; the window is one of numbers."""
    reset = ReferenceReset(reference_reset_stall=4)
    due = []
    for kl in (0.05, math.nan, 0.05, math.inf, 0.05, 0.05, math.nan):
        reset.observe(kl)
        due.append(reset.due)
    assert due == [False] * 5 + [True] * 2
    assert reset.steps == 7


def test_reset_when_kl_stalls() -> None:
    growing, flat = ReferenceReset(reference_reset_stall=4), ReferenceReset(reference_reset_stall=4)
    for step in range(10):
        growing.observe(0.01 * 1.3**step)
        flat.observe(0.05 + 0.001 * (step % 2))
        assert not growing.due
        assert flat.due == (step >= 3)
    assert not ReferenceReset().due
    zero = ReferenceReset(reference_reset_stall=2)
    for _ in pairwise(range(5)):
        zero.observe(0.0)
    assert not zero.due  # a policy that has not moved has nothing to reset


def test_reference_reset(make_trainer: Make) -> None:
    trainer = make_trainer(reference_reset_steps=2, max_steps=3, learning_rate=1e-2)
    before = trainer.ref_model.transformer.wte.weight.clone()
    moments = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            moments.append(len(trainer.optimizer.state) > 0)

    trainer.add_callback(Watch())
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[1] > 1e-5
    assert kls[2] == pytest.approx(0, abs=1e-9)
    assert moments == [False, True, False], "the optimizer forgets with the reference"
    assert not torch.equal(before, trainer.ref_model.transformer.wte.weight)
    assert {"step": 2, "reference_reset": True} in trainer.state.log_history
