"""A run that goes on past its end: the schedule is that of a run of so many steps, from the first of the new ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from rookworld_trl.checkpointing import resume
from tests.support.toy import make_trainer


@pytest.mark.parametrize(
    ("schedule", "factors", "ratio"),
    [
        ({"lr_scheduler_type": "linear"}, [1 / 2, 1 / 3, 1 / 6], 1),
        (
            {"lr_schedule": "advanced", "lr_decay_steps": 2, "lr_floor": 0.5, "warmup_steps": 0},
            [0.5 + 0.25 * (1 + math.cos(3 / 4 * math.pi)), 0.5, 0.25],
            3,
        ),
    ],
    ids=["linear", "advanced"],
)
def test_a_run_that_goes_on_past_its_end_has_the_schedule_of_the_longer_run(
    schedule: dict[str, Any], factors: list[float], ratio: int, tmp_path: Path
) -> None:
    """Steps 4 to 6 of 6 after 3 of 3, whose schedule had come to its end, at a new rate too."""
    make_trainer(tmp_path, max_steps=3, **schedule).train()
    settings = {"max_steps": 6, "logging_steps": 1, "learning_rate": ratio * 1e-2, "save_strategy": "no"}
    again = make_trainer(tmp_path, **settings, **schedule)
    weights: list[torch.Tensor] = []
    again.add_callback(WeightsAfterEachStep(again, weights))
    again.train(resume_from_checkpoint=True)
    rates = [row["learning_rate"] for row in again.state.log_history if row["step"] > 3 and "learning_rate" in row]
    assert rates == pytest.approx([ratio * 1e-2 * factor for factor in factors])
    end = load_file(tmp_path / "checkpoint-3" / "model.safetensors")["transformer.wte.weight"]
    assert not torch.equal(weights[0], end)


class WeightsAfterEachStep(TrainerCallback):
    def __init__(self, trainer: Any, into: list[torch.Tensor]):
        self.trainer, self.into = trainer, into

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.into.append(self.trainer.model.transformer.wte.weight.detach().clone())


def test_a_schedule_laid_anew_keeps_what_faults_have_cut() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.1)])
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 2))
    for _ in range(2):
        optimizer.step()
        schedule.step()
    resume.scale_learning_rate(optimizer, schedule, 0.5)
    longer = LambdaLR(optimizer, lambda step: 1 - step / 8)
    longer.load_state_dict(schedule.state_dict())
    resume.lay_schedule_anew(optimizer, longer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.375, 0.0375])
    assert longer.get_last_lr() == pytest.approx([0.375, 0.0375])
    optimizer.step()
    longer.step()
    assert longer.get_last_lr() == pytest.approx([0.3125, 0.03125])
