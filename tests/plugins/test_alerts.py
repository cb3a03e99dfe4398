"""Alerts reach a command and a server on loopback, and whatever goes wrong with them stays a warning."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from rookworld_trl.plugins import alerts
from rookworld_trl.plugins.alerts import Alerts


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.headers["Content-Type"], json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    http = HTTPServer(("127.0.0.1", 0), _Handler)
    http.received, http.status = [], 200  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_post(server: Any) -> None:
    alert = Alerts(f"http://127.0.0.1:{server.server_port}/hook?key=secret")
    alert.told({"event": "red", "step": 3, "metrics": {"kl": float("nan")}})
    alert.wait()
    ((kind, body),) = server.received
    assert kind == "application/json"
    assert (body["event"], body["step"]) == ("red", 3)
    assert body["time"].startswith("20")


def test_a_command_gets_it_on_its_standard_input(tmp_path: Path) -> None:
    out = tmp_path / "a file"
    alert = Alerts(f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())' '{out}'")
    alert.told({"event": "end"})
    assert json.loads(out.read_text())["event"] == "end"


@pytest.mark.parametrize("case", ["no such command", "fails", "hangs", "refused", "nobody there", "nonsense"])
def test_a_failure_is_a_warning(
    case: str, server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "TIMEOUT", 5.0 if case != "hangs" else 0.2)
    server.status = 500
    target = {
        "no such command": "/nowhere/at-all",
        "fails": f"{sys.executable} -c 'raise SystemExit(3)'",
        "hangs": "sh -c 'sleep 60'",
        "refused": f"http://127.0.0.1:{server.server_port}/",
        "nobody there": "http://127.0.0.1:9/",
        "nonsense": "http://[",
    }[case]
    alert = Alerts(target)
    alert.told({"event": "red"})
    alert.wait()
    assert "an alert could not be sent" in caplog.text
    assert target not in caplog.text, "an address may hold a secret"


def test_without_a_target_it_is_off() -> None:
    assert not Alerts().on


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
