"""The advanced curve at its joints and in a run."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from rookworld_trl.plugins.lr_schedule import advanced_schedule
from tests.plugins.conftest import rates


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


def test_without_warmup_and_without_decay() -> None:
    assert curve(10, 0, 0, 0.2)[0] == 1.0
    assert curve(10, 0, 0, 0.2)[10] == pytest.approx(0.2)
    assert curve(10, 0, 10, 0.5)[0] == pytest.approx(0.5)
    assert curve(4, 4, 0, 0.0) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.0])


def test_a_run_follows_the_curve(make_trainer: Callable[..., Any]) -> None:
    settings = {"warmup_steps": 2, "lr_floor": 0.1, "lr_decay_steps": 0.34, "max_steps": 6}
    expected = [1e-3 * advanced_schedule(step, 6, 2, 3, 0.1) for step in range(6)]  # a third of 6, rounded up: 3
    trainer = make_trainer(lr_schedule="advanced", learning_rate=1e-3, **settings)
    trainer.train()
    assert rates(trainer) == pytest.approx(expected)


def test_a_short_run_leaves_what_the_warm_up_does_not_take(make_trainer: Callable[..., Any]) -> None:
    """One of two steps is the warm-up, rounded up; a share of the rest, not more than there is, decays."""
    trainer = make_trainer(lr_schedule="advanced", learning_rate=1e-3, warmup_steps=0.03, lr_decay_steps=0.9)
    trainer.train()
    assert rates(trainer) == pytest.approx([0.5e-3, 0.1e-3])
