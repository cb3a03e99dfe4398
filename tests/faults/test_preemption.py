"""SIGTERM and Ctrl-C: a checkpoint at the end of the step, from which the run goes on exactly."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rookworld_trl.checkpointing import preemption as preemption_module
from rookworld_trl.checkpointing.preemption import SIGNALS, Preemption
from tests.support.checkpoint_diff import differences
from tests.support.toy import make_trainer

ROOT = Path(__file__).parents[2]


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
        pytest.param("_get_grad_norm", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param("_calculate_rewards", signal.SIGUSR1, marks=pytest.mark.slow),
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


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_is_noted_and_a_ctrl_c_after_it_stops_at_once(number: signal.Signals) -> None:
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
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with preemption.watching():
        assert preemption.signal == ""
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        preemption = Preemption()
        with preemption.watching():
            send(signal.SIGHUP)
            assert preemption.signal == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_evaluation_ends_at_once() -> None:
    preemption, done = Preemption(), []

    def work() -> str:
        done.append("begun")
        try:
            send(signal.SIGTERM)
        except Exception:  # a signal is no error that anybody may get over
            return "swallowed"
        return "ended"

    with preemption.watching():
        assert preemption.until_signalled(lambda: "whole") == "whole"
        assert preemption.until_signalled(work) is None
        assert preemption.until_signalled(work) is None  # not even begun
        assert (preemption.signal, done) == ("SIGTERM", ["begun"])
        send(signal.SIGTERM)  # again just noted


def test_the_answer_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the main thread is in a call that runs no handlers; a large model's step is made of such calls."""
    said: list[tuple[float, str]] = []
    monkeypatch.setattr(preemption_module, "say", lambda text: said.append((time.monotonic(), text)))
    preemption = Preemption()
    with preemption.watching():
        timer = threading.Timer(0.2, send, [signal.SIGTERM])
        timer.start()
        while not preemption.signal:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
            ended = time.monotonic()
    ((when, text),) = said
    assert text.startswith("\nSIGTERM: finishing this step")
    assert "Ctrl-C ends at once" in text
    assert when < ended - 0.2


HANGS_UP = """
import os, pty, signal, sys, time
from rookworld_trl.checkpointing.preemption import Preemption
result = sys.argv[1]
process, terminal = pty.fork()
if process:
    os.read(terminal, 100)
    os.close(terminal)  # the window is closed
    os.waitpid(process, 0)
else:
    preemption = Preemption()
    with preemption.watching():
        print("ready", flush=True)
        while not preemption.signal:
            time.sleep(0.01)
        for _ in range(3):
            print("step", flush=True)
            print("step", file=sys.stderr, flush=True)
        with open(result, "w") as file:
            file.write(preemption.signal)
    os._exit(0)
"""


def test_a_closed_terminal_does_not_end_the_step(tmp_path: Path) -> None:
    result = tmp_path / "result"
    subprocess.run([sys.executable, "-c", HANGS_UP, str(result)], timeout=60, check=True, cwd=ROOT)
    assert result.read_text() == "SIGHUP"


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
