"""SIGTERM and Ctrl-C: a checkpoint at the end of the step, from which the run goes on exactly."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rookworld_trl.checkpointing.stopping import SIGNALS, Preemption
from tests.support.checkpoint_diff import differences
from tests.support.toy import make_trainer


def signalling(phase: str, step: int, number: int, trainer: Any) -> None:
    """Have the signal come at the beginning of, within or at the end of a step."""
    original = getattr(trainer, phase)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(trainer, phase, wrapped)


OPTIONS: dict[str, Any] = {"max_steps": 4, "save_steps": 100}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that no signal came to."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, **OPTIONS).train()
    return folder / "checkpoint-4"


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("_calculate_rewards", signal.SIGINT),
        pytest.param("_get_grad_norm", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_exactly(whole: Path, tmp_path: Path, phase: str, number: int) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer(tmp_path, **OPTIONS)
    signalling(phase, 2, number, trainer)
    trainer.train()
    assert trainer.preemption.signal == signal.Signals(number).name
    assert trainer.state.global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = make_trainer(tmp_path, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.preemption.signal == ""
    assert [line for line in differences(whole, tmp_path / "checkpoint-4") if "run_id" not in line] == []


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted_and_a_ctrl_c_after_it_stops_at_once(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    preemption = Preemption()
    with preemption.watching():
        send(number)
        for again in SIGNALS:  # schedulers repeat themselves
            if again != signal.SIGINT:
                send(again)
        with preemption.watching():  # of the training inside of the run
            assert preemption.signal == number.name
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    said = f"{number.name}: finishing this step and saving; Ctrl-C ends at once, without saving"
    assert capfd.readouterr().err == f"\n{said}\n"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with preemption.watching():
        assert preemption.signal == ""
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
