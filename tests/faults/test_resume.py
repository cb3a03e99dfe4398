"""A run interrupted after any step ends with the very checkpoint of the run that was not: tolerance zero."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.resume_worker import CONFIGURATIONS, interrupted_everywhere
from tests.faults.toy import make_trainer
from tests.support.checkpoint_diff import differences

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "iterations" else pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_bit_equal_at_every_step(name: str, tmp_path: Path) -> None:
    found = interrupted_everywhere(tmp_path, **CONFIGURATIONS[name])
    assert len(found) == CONFIGURATIONS[name]["max_steps"] + 1
    assert {where: lines for where, lines in found.items() if lines} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["iterations", "epochs"])
def test_bit_equal_at_every_step_on_two_processes(name: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {**CONFIGURATIONS[name], "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    worker = ["-m", "tests.faults.resume_worker", json.dumps(options), str(tmp_path)]
    done = subprocess.run([*launcher, *worker], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found.pop("signal") == [1, 1, True], "a signal to one process stops all at the same step, after a save"
    assert found.pop("full disk") == ["failed", "failed"], "a save that fails in one process fails in all"
    assert len(found) == options["max_steps"] + 1
    assert {where: lines for where, lines in found.items() if lines} == {}
    assert (tmp_path / "whole" / "checkpoint-1" / "progress_1.json").exists()


def change_weight(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] += 1e-7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.safetensors['transformer.wte.weight']"


def change_moment(folder: Path) -> str:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"][0, 0] += 1e-9
    torch.save(state, folder / "optimizer.pt")
    return "optimizer.pt['state'][0]['exp_avg']"


def change_generator(folder: Path) -> str:
    path = folder / "rng_state.pth"
    state = torch.load(path, weights_only=False)
    python = list(state["python"])
    state["python"] = (python[0], (python[1][0] ^ 1, *python[1][1:]), python[2])
    torch.save(state, path)
    return "rng_state.pth['python'][1][0]"


def change_log(folder: Path) -> str:
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][0]["loss"] += 1e-12
    path.write_text(json.dumps(state))
    return "trainer_state.json['log_history'][0]['loss']"


def change_place_in_cycle(folder: Path) -> str:
    path = folder / "progress_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 99}))
    return "progress_0.json['step']"


def drop_file(folder: Path) -> str:
    (folder / "scheduler.pt").unlink()
    return "scheduler.pt: only in one"


CHANGES = [change_weight, change_moment, change_generator, change_log, change_place_in_cycle, drop_file]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Guard: a checkpoint equals itself, and one changed value anywhere is found, by name, and nothing else."""
    make_trainer(tmp_path / "run", max_steps=1).train()
    original = tmp_path / "run" / "checkpoint-1"
    for change in CHANGES:
        copy = shutil.copytree(original, tmp_path / "copy", dirs_exist_ok=True)
        assert differences(original, copy) == []
        place = change(copy)
        (line,) = differences(original, copy)
        assert line.startswith(place), (change.__name__, line)
        shutil.rmtree(copy)


def test_a_forgotten_buffer_would_show(tmp_path: Path) -> None:
    """Guard: what stock TRL loses in the middle of a generation cycle makes the ends differ."""
    options: dict[str, Any] = {"num_iterations": 3, "max_steps": 3}
    make_trainer(tmp_path / "whole", **options).train()
    trainer = make_trainer(tmp_path / "resumed", **options)
    load = trainer._load_optimizer_and_scheduler

    def forget(checkpoint: str | None) -> None:
        load(checkpoint)
        trainer._step, trainer._buffered_inputs = 0, None

    trainer._load_optimizer_and_scheduler = forget  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    found = differences(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert any(line.startswith("model.safetensors") for line in found)


@pytest.mark.slow
def test_generators_are_not_merely_seeded_alike(tmp_path: Path) -> None:
    """Guard: the resumed run draws from where the first one stopped, whatever happened to the generators before."""
    make_trainer(tmp_path / "whole", max_steps=2).train()
    trainer = make_trainer(tmp_path / "resumed", max_steps=2)
    torch.manual_seed(999)
    random.seed(999)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert differences(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2") == []
