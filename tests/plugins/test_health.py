"""Bands, events and the line for a person."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rookworld_trl.plugins.health import DEFAULT_BANDS, Health, level_of
from rookworld_trl.training import Plugin
from tests.support.disk import full_disk


def health(bands: dict[str, Any], patience: int = 1) -> Health:
    """With these bands alone."""
    return Health(dict.fromkeys(DEFAULT_BANDS) | bands, patience)


@pytest.mark.parametrize(
    ("value", "band", "level"),
    [
        (0.09, (0.1, 0.5), "green"),
        (0.1, (0.1, 0.5), "yellow"),
        (0.49, (0.1, 0.5), "yellow"),
        (0.5, (0.1, 0.5), "red"),
        (0.31, (0.3, 0.1), "green"),
        (0.3, (0.3, 0.1), "yellow"),
        (0.1, (0.3, 0.1), "red"),
        (float("nan"), (0.3, 0.1), "red"),
        (float("inf"), (0.1, 0.5), "red"),
    ],
)
def test_levels_by_hand(value: float, band: tuple[float, float], level: str) -> None:
    assert level_of(value, *band) == level


def test_events_at_changes_only() -> None:
    monitor = health({"kl": [0.1, 0.5], "*/parsed": [0.9, 0.5]})
    assert monitor.observe(1, {"kl": 0.01, "loss": 9.0, "policy/parsed": 1.0}) == []
    assert monitor.level == "green"
    assert monitor.observe(2, {"kl": 0.2, "policy/parsed": 0.4}) == [
        {"step": 2, "metric": "kl", "value": 0.2, "from": "green", "to": "yellow"},
        {"step": 2, "metric": "policy/parsed", "value": 0.4, "from": "green", "to": "red"},
    ]
    assert monitor.level == "red"
    assert monitor.observe(3, {"kl": 0.3}) == []
    events = monitor.observe(4, {"kl": 0.05, "policy/parsed": None})
    assert [(event["metric"], event["to"]) for event in events] == [("kl", "green")]


def test_a_change_must_last() -> None:
    """Three in a row beyond the present level, and only as far as the mildest of them; a NaN needs no company."""
    monitor = health({"kl": [0.1, 0.5]}, 3)
    series = [0.2, 0.2, 0.0, 0.9, 0.2, 0.9, 0.9, 0.9, 0.0, 0.2, 0.0, float("nan")]
    levels = []
    for step, value in enumerate(series):
        monitor.observe(step, {"kl": value})
        levels.append(monitor.level)
    green, yellow, red = "green", "yellow", "red"
    assert levels == [green] * 5 + [yellow] * 2 + [red] * 2 + [red] + [yellow] + [red]


def test_the_monitor_is_restored() -> None:
    first, second = (health({"kl": [0.1, 0.5]}, 2) for _ in range(2))
    for value in (0.2, 0.2, 0.9):
        first.observe(1, {"kl": value})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.level == first.level == "yellow"
    assert [event["to"] for event in second.observe(2, {"kl": 0.9})] == ["red"]


class Told(Plugin):
    NAME = "told"

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def told(self, event: Any) -> None:
        self.events.append(event)


def test_a_run_records_and_tells_what_turns_red(make_trainer: Callable[..., Any], options: dict[str, Any]) -> None:
    told = Told()
    trainer = make_trainer(health_bands={"entropy": [0.0, 0.001], "kl": None}, health_patience=1)
    trainer.add_callback(told)
    trainer.train()
    assert "kl" not in trainer.plugins[0].bands
    assert trainer.plugins[0].bands["grad_norm"] == DEFAULT_BANDS["grad_norm"]
    assert [event["event"] for event in told.events] == ["red", "end"]
    red = told.events[0]
    assert (red["run"], red["step"], list(red["metrics"])) == (options["output_dir"], 1, ["entropy"])
    events = [json.loads(row) for row in (Path(options["output_dir"]) / "health.jsonl").read_text().splitlines()]
    assert ("entropy", "red") in {(event["metric"], event["to"]) for event in events}


def test_bands_that_are_none_are_refused_and_no_bands_are_off() -> None:
    with pytest.raises(ValueError, match=r"`health_bands\[kl\]` is \[0.1\]: .* Write \[yellow, red\]"):
        Health(health_bands={"kl": [0.1]})
    assert not Health(health_bands=dict.fromkeys(DEFAULT_BANDS)).on


def test_a_full_disk_costs_events_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, told = health({"kl": [0.1, 0.5]}), Told()
    monitor.attach(SimpleNamespace(tell=told.told))
    monkeypatch.setattr("rookworld_trl.plugins.health.append_line", full_disk)
    state, args = SimpleNamespace(is_world_process_zero=True, global_step=1), SimpleNamespace(output_dir=tmp_path)
    monitor.on_log(args, state, None, logs={"loss": 0.0, "kl": 2.0})
    assert (monitor.level, len(told.events), list(tmp_path.iterdir())) == ("red", 1, [])
