"""Seconds of a step's parts, and peaks of memory by phase."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rookworld_trl.memory import Memory, memory_gb
from rookworld_trl.plugins.throughput import Throughput

ARGS: Any = SimpleNamespace(torch_compile=False)


def test_a_steps_parts() -> None:
    """2 s of sampling in two parts and 1 s of rewards in a step of 10 s: the rest is learning."""
    recorded: dict[str, float] = {}
    meter = Throughput()
    meter.attach(SimpleNamespace(record=recorded.__setitem__))
    meter.on_step_begin(ARGS, None, None)
    for phase, seconds in (("sampling", 1.5), ("sampling", 0.5), ("rewards", 1.0)):
        meter.ended(phase, seconds)
    meter.started -= 10.0
    meter.on_step_end(ARGS, None, None)
    assert recorded["perf/memory_gb"] > 0
    assert (recorded["perf/seconds_sampling"], recorded["perf/seconds_rewards"]) == (2.0, 1.0)
    assert recorded["perf/seconds_learning"] == pytest.approx(7.0, abs=0.5)
    meter.on_step_begin(ARGS, None, None)
    assert meter.seconds == {}


def test_a_run_reports_its_throughput(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(throughput=True)
    trainer.train()
    log = trainer.state.log_history[1]
    assert min(log[f"perf/seconds_{name}"] for name in ("sampling", "rewards", "learning")) > 0


class Card:
    """A GPU's allocator: what is in use, and the most since it was last asked to forget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0.0
        for name, value in {
            "is_available": lambda: True,
            "memory_allocated": lambda: self.now * 1e9,
            "memory_reserved": lambda: 2 * self.now * 1e9,
            "max_memory_allocated": lambda: self.peak * 1e9,
            "reset_peak_memory_stats": self.forget,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def forget(self) -> None:
        self.peak = self.now

    def use(self, *gb: float) -> None:
        for self.now in gb:
            self.peak = max(self.peak, self.now)


def test_peaks_belong_to_their_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    card, memory = Card(monkeypatch), Memory()
    card.use(9, 1)  # an evaluation before training
    memory.begin()
    for rollout in ((3, 1), (4, 1), (2, 1)):  # mining draws several times
        card.use(*rollout)
        memory.ended("rollout")
    card.use(2.5, 1.5)
    memory.ended("scoring")
    card.use(6, 1.25)
    assert memory.step() == {
        "gb": 9,
        "allocated_gb": 1.25,
        "reserved_gb": 2.5,
        "rollout_gb": 4,
        "scoring_gb": 2.5,
        "learn_gb": 6,
    }
    card.use(10, 1)  # an evaluation, which samples
    memory.ended("rollout")
    memory.begin()
    card.use(5, 1)
    assert memory.step() == {"gb": 10, "allocated_gb": 1, "reserved_gb": 2, "learn_gb": 5}


def test_memory_of_a_run_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    assert memory_gb() > 0.1
    figures = Memory().step()
    assert figures.keys() == {"gb", "rss_gb"}
    assert all(0.1 < value < 50 for value in figures.values())
    card.use(5)
    assert memory_gb() == 5
