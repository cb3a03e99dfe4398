"""Memory over time: what each phase takes is told apart, and many steps take no more than a few."""

import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rookworld_trl.training import RookWorldGRPOTrainer
from rookworld_trl.training.memory import Memory, memory_gb

Make = Callable[..., RookWorldGRPOTrainer]
ROOT = Path(__file__).parents[2]


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


class Tensors(TrainerCallback):
    """Bytes of all tensors that are alive at the end of an early step and of a late one."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.bytes = steps, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
            self.bytes.append(sum(each.numel() * each.element_size() for each in tensors))


WITH_KL = {"beta": 0.1, "recovery": True, "throughput": True}
GAE = {"beta": 0.0, "throughput": True, "use_gae": True, "scale_rewards": "none", "share_prefixes": False}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "leak"), [(WITH_KL, 0), (GAE, 0), (WITH_KL, 1000)], ids=["KL", "GAE", "a leak"])
def test_many_steps_keep_no_more_tensors_than_a_few(make_trainer: Make, case: dict[str, Any], leak: int) -> None:
    """But for the batch at hand, whose rows differ in length by some kilobytes."""
    kept: list[torch.Tensor] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        kept.append(torch.ones(leak))
        return [float(len(text)) for text in completions]

    watch = Tensors(10, 34)
    trainer = make_trainer(_reward=reward, rollout_backend="native", max_steps=34, recovery_snapshot_steps=2, **case)
    trainer.add_callback(watch)
    trainer.train()
    early, late = watch.bytes
    assert (late - early > 50_000) == bool(leak), watch.bytes
    assert all(log["perf/memory_rss_gb"] > 0 for log in trainer.state.log_history if "loss" in log)


# glibc's count of what is allocated. With PYTHONMALLOC=malloc it holds Python's objects as well as tensors.
NANO_STEPS = """
import ctypes, json
from transformers import TrainerCallback, trainer
from benchmarks.common import timed_training
from rookworld_trl.modeling.loading import NANO_FOLDER, load

class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks in_use".split()]
    _fields_ += [("free", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

allocated = ctypes.CDLL("libc.so.6").mallinfo2
allocated.restype = Allocated
in_use = []

class Watch(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        now = allocated()
        in_use.append((now.in_use + now.hblkhd) / 1e6)

trainer.DEFAULT_CALLBACKS.append(Watch)
sizes = {"prompts": 4, "samples": 4, "tokens": 60, "steps": 500, "micro_batch": 8}
log = timed_training(*load(NANO_FOLDER), device="cpu", recovery=True, mining=False, **sizes)["log"]
print(json.dumps([in_use, [1000 * row["perf/memory_rss_gb"] for row in log]]))
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_five_hundred_steps_of_nano_do_not_grow() -> None:
    """Over the last 300 steps what is in use grows by less than 10 MB: by the lines of the log, some 12 kB each.

    The resident set is no measure of a leak: what is freed is kept for the next pass, so it shows the most that was
    ever needed at once, holes included, and goes up by tens of megabytes at the step that needs a little more.
    """
    environment = {**os.environ, "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", NANO_STEPS]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    in_use, resident = json.loads(done.stdout.strip().splitlines()[-1])
    early, late = min(in_use[150:200]), min(in_use[-50:])
    print(f"\nin use at step 200: {early:.1f} MB, at step 500: {late:.1f} MB")
    print(f"resident set: {resident[200]:.0f} MB and {resident[-1]:.0f} MB")
    assert len(in_use) == len(resident) == 501
    assert late - early < 10
    assert resident[-1] < 1.1 * resident[200]
