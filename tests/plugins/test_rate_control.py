"""The control of the learning rate by the KL."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from rookworld_trl.plugins.rate_control import RateControl
from tests.plugins.conftest import rates


def test_the_rate_control_by_hand() -> None:
    """Two steps in a row above 0.1 halve the rate, down to a tenth; two in a row within it add a tenth."""
    control = RateControl("kl")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 1.0)

    def step(kl: float) -> float:
        control.observe(kl, 0.1)
        control.move(2, optimizer, schedule)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * control.scale)
        return control.scale

    scales = [step(kl) for kl in (0.2, 0.0, 0.2, 0.2, math.nan, 0.2, 0.2, 0.05, 0.1, 0.05, 0.05)]
    assert scales == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.275, 0.275, 0.3025])
    assert [step(9.0) for _ in range(10)][-1] == 0.1
    assert [step(0.0) for _ in range(100)][-1] == 1.0


def test_a_controlled_rate_in_a_run(make_trainer: Callable[..., Any]) -> None:
    constant = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 6}
    trainer = make_trainer(lr_control="kl", kl_target=1e-9, kl_interval=2, **constant)
    trainer.train()
    # The first step starts at the reference: its KL is 0. So steps 2 and 3, and 4 and 5, are above.
    assert rates(trainer) == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3])
    assert [row["kl/rate_scale"] for row in trainer.state.log_history if "kl/rate_scale" in row][-1] == 0.25
