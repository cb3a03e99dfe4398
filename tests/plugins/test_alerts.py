"""Alerts reach a command, and whatever goes wrong with them stays a warning."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from rookworld_trl.plugins import alerts
from rookworld_trl.plugins.alerts import Alerts


def test_a_command_gets_it_on_its_standard_input(tmp_path: Path) -> None:
    out = tmp_path / "a file"
    alert = Alerts(f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())' '{out}'")
    alert.told({"event": "red", "step": 3, "metrics": {"kl": float("nan")}})
    told = json.loads(out.read_text())
    assert (told["event"], told["step"], told["time"][:2]) == ("red", 3, "20")


@pytest.mark.parametrize(
    "command", ["/nowhere/at-all", f"{sys.executable} -c 'raise SystemExit(3)'", "sh -c 'sleep 60'"]
)
def test_a_failure_is_a_warning(
    command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "TIMEOUT", 0.2 if "sleep" in command else 5.0)
    Alerts(command).told({"event": "red"})
    assert "an alert could not be sent" in caplog.text
    assert command not in caplog.text, "it may hold a secret"


@pytest.mark.parametrize("target", ["", "mail 'x"])
def test_no_command(target: str) -> None:
    with pytest.raises(ValueError, match=r"`alert` is .*(empty|quotation)"):
        Alerts(target)


def test_the_end_is_told_however_it_comes(make_trainer: Any) -> None:
    class Kept(TrainerCallback):
        def told(self, event: Any) -> None:
            events.append(event)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if events:
                raise KeyboardInterrupt("ctrl-c")

    events: list[Any] = []
    trainer = make_trainer(max_steps=1)
    trainer.add_callback(Kept())
    trainer.train()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = {"event": "end", "run": trainer.args.output_dir}
    assert events == [
        run | {"outcome": "finished", "step": 1, "stop_reason": ""},
        run | {"outcome": "KeyboardInterrupt: ctrl-c", "step": 0, "stop_reason": ""},
    ]


def test_a_run_sends_its_events(make_trainer: Any) -> None:
    """A command that fails costs nothing, and what it is called stands in no checkpoint."""
    trainer = make_trainer(alert="/nowhere/at-all", max_steps=1)
    (plugin,), sent = trainer.plugins, list[dict[str, Any]]()
    send = plugin._send
    plugin._send = lambda body: (sent.append(json.loads(body)), send(body))
    trainer.train()
    assert [(event["event"], event["outcome"]) for event in sent] == [("end", "finished")]
    assert "/nowhere" not in json.dumps(trainer.identity.fingerprint)
