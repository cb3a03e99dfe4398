"""SIGTERM and Ctrl-C: a checkpoint at the end of the step, from which the run goes on exactly."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from rookworld_trl.checkpointing.preemption import Preemption
from tests.faults.toy import make_trainer
from tests.support.checkpoint_diff import differences


def signalling(phase: str, step: int, number: int, trainer: Any) -> None:
    """Have the signal come at the beginning of, within or at the end of a step."""
    original = getattr(trainer, phase)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(trainer, phase, wrapped)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("_calculate_rewards", signal.SIGINT),
        pytest.param("_prepare_inputs", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("_get_grad_norm", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path: Path, phase: str, number: int) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 100}
    make_trainer(tmp_path / "whole", **options).train()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer(tmp_path / "run", **options)
    signalling(phase, 2, number, trainer)
    trainer.train()
    assert trainer.preemption.signal == signal.Signals(number).name
    assert trainer.state.global_step == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = make_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.preemption.signal == ""
    found = differences(tmp_path / "whole" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    assert [line for line in found if "run_id" not in line] == []


def test_a_second_ctrl_c_stops_at_once() -> None:
    preemption = Preemption()
    with preemption.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        assert preemption.signal == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with preemption.watching():
        assert preemption.signal == ""
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with Preemption().watching():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
