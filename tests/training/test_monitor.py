"""Bands, events and the line for a person; the truth's log-prob against an unpadded count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from rookworld_trl.training.monitor import DEFAULT_BANDS, HealthMonitor, level_of, target_logps, target_rows


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
    monitor = HealthMonitor({"kl": (0.1, 0.5), "*/parsed": (0.9, 0.5)})
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
    monitor = HealthMonitor({"kl": (0.1, 0.5)}, patience=3)
    series = [0.2, 0.2, 0.0, 0.9, 0.2, 0.9, 0.9, 0.9, 0.0, 0.2, 0.0, float("nan")]
    levels = []
    for step, value in enumerate(series):
        monitor.observe(step, {"kl": value})
        levels.append(monitor.level)
    green, yellow, red = "green", "yellow", "red"
    assert levels == [green] * 5 + [yellow] * 2 + [red] * 2 + [red] + [yellow] + [red]


def test_the_line() -> None:
    monitor = HealthMonitor(DEFAULT_BANDS)
    logs = {"reward": 0.3123, "kl": 0.2, "environment/parsed": 0.4, "policy/parsed": 0.97, "groups/informative": 0.22}
    events = monitor.observe(12, logs)
    assert monitor.line(12, logs, events) == (
        "step 12 health red: kl 0.2 yellow (was green), environment/parsed 0.4 (was green), "
        "groups/informative 0.22 yellow (was green)"
    )
    logs |= {"environment/parsed": 0.95}
    events = monitor.observe(13, logs)
    assert monitor.line(13, logs, events) == (
        "step 13 health yellow: environment/parsed 0.95 green (was red), kl 0.2, groups/informative 0.22"
    )
    monitor.observe(14, {"kl": 0.0, "groups/informative": 1.0})
    assert monitor.line(14, {}) == "step 14 health green"


def test_the_monitor_is_restored() -> None:
    first, second = (HealthMonitor({"kl": (0.1, 0.5)}, patience=2) for _ in range(2))
    for value in (0.2, 0.2, 0.9):
        first.observe(1, {"kl": value})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.level == first.level == "yellow"
    assert [event["to"] for event in second.observe(2, {"kl": 0.9})] == ["red"]


def test_default_bands() -> None:
    """Structure validity is red below 0.8, the KL's 95th percentile at 45, the reward at -0.2."""
    monitor = HealthMonitor(DEFAULT_BANDS)
    bad = {"policy/parsed": 0.79, "kl/sequence_p95": 45.0, "reward": -0.2, "loss": 10.0, "policy/best_legal": 0.49}
    warned = {"policy/parsed": 0.81, "kl/sequence_p95": 31.0, "reward": -0.1, "loss": 3.0, "policy/best_legal": 0.6}
    good = {"policy/parsed": 0.95, "kl/sequence_p95": 29.0, "reward": 0.1, "loss": -0.4, "policy/best_legal": 0.9}
    for logs, level in ((bad, "red"), (warned, "yellow"), (good, "green")):
        monitor.observe(1, logs)
        assert monitor.levels == dict.fromkeys(logs, level)


def test_a_run_alerts_at_red_and_at_its_end(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Sent before anything is known to be wrong with it; a command that fails costs nothing."""
    told: list[dict[str, Any]] = []
    trainer = make_trainer(health_bands={"entropy": [0.0, 0.001]}, health_patience=1, alert="/nowhere/at-all")
    (alerts,) = trainer.plugins
    send = alerts._send
    alerts._send = lambda body: (told.append(json.loads(body)), send(body))
    trainer.train()
    assert [event["event"] for event in told] == ["red", "end"]
    assert (told[0]["step"], list(told[0]["metrics"])) == (1, ["entropy"])
    assert (told[1]["outcome"], told[1]["step"], told[1]["stop_reason"]) == ("finished", 2, "")
    assert "/nowhere" not in json.dumps(trainer.identity.fingerprint)


def test_truth_logps_equal_unpadded_scoring(policy: GPT2LMHeadModel) -> None:
    policy.eval()
    rows = [([20, 21, 22, 23, 24], [3]), ([5, 6, 7], [8]), ([4], [11, 12, 13, 14])]  # not in the order of lengths
    expected = []
    for prompt, target in rows:
        with torch.no_grad():
            logps = policy(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        expected.append(sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(target)))
    assert target_logps(policy, rows, pad_token_id=0, batch_size=2).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_run_records_health_and_truth(make_trainer: Callable[..., Any], options: dict[str, Any]) -> None:
    """A band that the run must leave gives an event; the truth's gain is 0 before the first update moved anything."""
    trainer = make_trainer(
        health_bands={"entropy": [0.0, 0.001], "kl": None}, health_patience=1, learning_rate=1e-2, peak_tflops=1000.0
    )  # fmt: skip
    assert "kl" not in trainer.args.bands()
    assert trainer.args.bands()["grad_norm"] == DEFAULT_BANDS["grad_norm"]
    dataset = trainer.train_dataset.add_column("target", ["aa", "b", "h1h2", "k", "q", "r", "ee", "f"])
    trainer.target_probe.rows = target_rows(dataset, trainer.processing_class, "target", 4, 64)
    assert len(trainer.target_probe.rows) == 4
    assert trainer.target_probe.rows[1][1][-1] == trainer.processing_class.eos_token_id
    trainer.target_probe.every = 1
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["truth/logp_gain"] == pytest.approx(log[0]["truth/logp"] - trainer.target_probe.before, abs=1e-5)
    assert log[1]["truth/logp_gain"] != 0
    assert 0 < log[1]["perf/mfu"] < 1
    assert 0 <= log[0]["groups/informative"] <= 1
    events = [json.loads(row) for row in (Path(options["output_dir"]) / "health.jsonl").read_text().splitlines()]
    assert {"entropy"} <= {event["metric"] for event in events if event["to"] == "red"}
    assert target_rows(trainer.train_dataset, trainer.processing_class, "target", 4, 64) == []
    assert target_rows(dataset, trainer.processing_class, "target", 4, 1) == []
