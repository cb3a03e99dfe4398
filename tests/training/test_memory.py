"""Memory over time: many steps take no more than a few."""

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

Make = Callable[..., RookWorldGRPOTrainer]
ROOT = Path(__file__).parents[2]


class Tensors(TrainerCallback):
    """Bytes of all tensors that are alive at the end of an early step and of a late one."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.bytes = steps, list[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
            self.bytes.append(sum(each.numel() * each.element_size() for each in tensors))


WITH_KL = {"beta": 0.1, "recovery": True}
GAE = {"beta": 0.0, "use_gae": True, "scale_rewards": "none", "share_prefixes": False}


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
