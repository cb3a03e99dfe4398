"""The limit of training's time: it ends the run, the rate has fallen by then, and a resumed run goes on alike."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rookworld_trl.plugins import time_limit
from tests.plugins.conftest import rates
from tests.support.checkpoint_diff import IGNORED, differences

PLAN = {"max_steps": 10, "warmup_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "logging_steps": 1}


@pytest.fixture
def steps_take(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds that a step takes: the clock is read when training begins and at the end of each step."""

    def set_clock(seconds: float) -> None:
        ticks = itertools.count(1000.0, seconds)
        monkeypatch.setattr(time_limit, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    return set_clock


def test_the_rate_has_fallen_when_the_time_is_over(make_trainer: Any, steps_take: Any) -> None:
    """Steps of 8 of 60 seconds. The warm-up ends after 16; of the other 44 each step takes 8, so that the eighth step,
    after which 64 have passed, is the last, at 4/44 of the peak: when k steps are done, 1 - (8 k - 16) / 44."""
    steps_take(8.0)
    trainer = make_trainer(**PLAN, max_train_minutes=1.0)
    trainer.train()
    shares = [0.0, 0.5, 1.0, 36 / 44, 28 / 44, 20 / 44, 12 / 44, 4 / 44]
    assert rates(trainer) == pytest.approx([1e-3 * share for share in shares])


def test_a_machine_that_is_fast_enough_follows_the_schedule_bit_for_bit(make_trainer: Any, steps_take: Any) -> None:
    steps_take(5.0)
    trainer = make_trainer(**PLAN, max_train_minutes=1.0)
    trainer.train()
    assert rates(trainer) == [1e-3 * f for f in (0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)]


def test_a_resumed_run_is_the_same_to_the_bit(make_trainer: Any, steps_take: Any, tmp_path: Path) -> None:
    saving = {**PLAN, "max_train_minutes": 1.0, "save_strategy": "steps", "save_steps": 1}
    steps_take(8.0)
    make_trainer(**saving, output_dir=tmp_path / "whole").train()
    steps_take(8.0)
    first = make_trainer(**saving, output_dir=tmp_path / "parts")
    first.add_callback(_Stop())
    first.train()
    steps_take(8.0)
    second = make_trainer(**saving, output_dir=tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8
    assert (
        differences(tmp_path / "whole" / "checkpoint-8", tmp_path / "parts" / "checkpoint-8", (*IGNORED, "run_id"))
        == []
    )


class _Stop(time_limit.Plugin):
    NAME = "stop"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == 4
        control.should_save |= state.global_step == 4


def test_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`max_train_minutes` is 0: it must be above 0"):
        time_limit.TimeLimit(0)
