"""The advanced curve at its joints and in a run, and the control of the rate by the KL."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from rookworld_trl.training.schedules import RateControl, advanced_schedule


def curve(total: int, warmup: int, decay: int, floor: float) -> list[float]:
    return [advanced_schedule(step, total, warmup, decay, floor) for step in range(total + 1)]


def test_joints_by_hand() -> None:
    """100 updates: 9 of warm-up, cosine from 9 to 80, 20 of decay, floor 0.1."""
    factor = curve(100, 9, 20, 0.1)
    assert factor[0] == pytest.approx(0.1)
    assert factor[8] == pytest.approx(0.9)
    assert factor[9] == 1.0
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 36 / 71)) / 2
    assert factor[45] == pytest.approx(middle)
    assert factor[79] == pytest.approx(0.1, abs=1e-3)
    assert factor[80] == pytest.approx(0.1)
    assert factor[90] == pytest.approx(0.05)
    assert factor[99] == pytest.approx(0.005)
    assert factor[100] == 0.0


def test_shape() -> None:
    factor = curve(100, 9, 20, 0.1)
    assert factor[:10] == sorted(factor[:10])
    assert factor[9:] == sorted(factor[9:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(factor[9:])) < 0.025  # no jump at a joint


def test_without_warmup_and_without_decay() -> None:
    assert curve(10, 0, 0, 0.2)[0] == 1.0
    assert curve(10, 0, 0, 0.2)[10] == pytest.approx(0.2)
    assert curve(10, 0, 10, 0.5)[0] == pytest.approx(0.5)
    assert curve(4, 4, 0, 0.0) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.0])


def rates(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_run_follows_the_curve(make_trainer: Callable[..., Any]) -> None:
    settings = {"warmup_steps": 2, "lr_floor": 0.1, "lr_decay_steps": 0.34, "max_steps": 6}
    expected = [1e-3 * advanced_schedule(step, 6, 2, 3, 0.1) for step in range(6)]  # a third of 6, rounded up: 3
    trainer = make_trainer(lr_schedule="advanced", learning_rate=1e-3, **settings)
    trainer.train()
    assert rates(trainer) == pytest.approx(expected)


def test_transformers_schedules_still_work(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(lr_scheduler_type="constant", learning_rate=1e-3)
    trainer.train()
    assert rates(trainer) == pytest.approx([1e-3, 1e-3])


def test_a_short_run_leaves_what_the_warm_up_does_not_take(make_trainer: Callable[..., Any]) -> None:
    """One of two steps is the warm-up, rounded up; a share of the rest, not more than there is, decays."""
    trainer = make_trainer(lr_schedule="advanced", learning_rate=1e-3, warmup_steps=0.03, lr_decay_steps=0.9)
    trainer.train()
    assert rates(trainer) == pytest.approx([0.5e-3, 0.1e-3])


def test_the_rate_control_by_hand() -> None:
    """Two steps in a row above 0.1 halve the rate, down to a tenth; two in a row within it add a tenth."""
    control = RateControl(patience=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    ending: Any = {"args": None, "state": None, "control": None, "optimizer": optimizer, "lr_scheduler": schedule}

    def step(kl: float) -> float:
        control.observe(kl, 0.1)
        control.on_step_end(**ending)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * control.scale)
        return control.scale

    scales = [step(kl) for kl in (0.2, 0.0, 0.2, 0.2, math.nan, 0.2, 0.2, 0.05, 0.1, 0.05, 0.05)]
    assert scales == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.275, 0.275, 0.3025])
    assert [step(9.0) for _ in range(10)][-1] == 0.1
    assert [step(0.0) for _ in range(100)][-1] == 1.0


def test_a_controlled_rate_in_a_run(make_trainer: Callable[..., Any]) -> None:
    """The recovery's own cut multiplies it."""
    constant = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 6}
    trainer = make_trainer(lr_control="kl", kl_target=1e-9, kl_interval=2, **constant)
    trainer.train()
    # The first step starts at the reference: its KL is 0. So steps 2 and 3, and 4 and 5, are above.
    assert rates(trainer) == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3])
    assert [row["kl/rate_scale"] for row in trainer.state.log_history if "kl/rate_scale" in row][-1] == 0.25
    before = trainer.optimizer.param_groups[0]["lr"]
    trainer.learning_rate_cut.cut(trainer.optimizer, trainer.lr_scheduler)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(before / 2)
