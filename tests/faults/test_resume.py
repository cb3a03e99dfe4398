"""A run interrupted after any step ends with the very checkpoint of the run that was not: tolerance zero."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from rookworld_trl.checkpointing.store import CheckpointError
from tests.support.checkpoint_diff import differences
from tests.support.disk import full_disk
from tests.support.processes import called
from tests.support.toy import make_trainer

# Each adds a way in which a run's state can be lost.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 3,
        "lr_scheduler_type": "cosine",
        "advantage_baseline": "ema",
        "log_completions": True,
        "lr_control": "kl",
        "kl_target": 1e-9,
        "kl_interval": 2,
    },
    "iterations": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 5,
        "logging_steps": 2,
        "kl_control": "multiplicative",
        "kl_target": 1e-4,
        "kl_interval": 3,
    },
    "epochs": {
        "rows": 6,
        "shuffle_dataset": True,
        "max_steps": 5,
        "rollout_backend": "transformers",
    },
    "value head": {
        "use_gae": True,
        "max_steps": 3,
        "lr_schedule": "advanced",
        "weight_decay": 0.1,
        "num_iterations": 2,
    },
    "mining": {"mining": True, "rows": 16, "max_steps": 3, "gradient_accumulation_steps": 2, "num_iterations": 2},
    "reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 3},
    "adapters": {"use_peft": True, "lora_r": 2, "max_steps": 3, "num_iterations": 2},
}


def interrupted_everywhere(folder: Path, **options: Any) -> dict[str, list[str]]:
    """Differences of the last checkpoint, by where the run was interrupted, from a run that never even saved before."""
    last = f"checkpoint-{options['max_steps']}"
    silent = make_trainer(folder / "silent", **{**options, "save_steps": 1000})
    silent.train()
    whole = make_trainer(folder / "whole", **options)
    whole.train()
    found = {}
    for step in range(options["max_steps"] + 1):
        if step == 0:
            resumed = folder / "silent"
        else:
            resumed = folder / f"from-{step}"
            trainer = make_trainer(resumed, **{**options, "save_steps": 1000})
            trainer.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
        if silent.accelerator.is_main_process:
            if step == options["max_steps"]:
                found["finished"] = moved_on(trainer.model, resumed, folder / "whole" / last)
            else:
                lines = differences(folder / "whole" / last, resumed / last)
                found[f"interrupted after {step}" if step else "never saved"] = [
                    line for line in lines if expected(line, step)
                ]
        silent.accelerator.wait_for_everyone()
    return found


def expected(line: str, step: int) -> bool:
    """Whether equality is asked for: two runs from the start have two ids."""
    return step > 0 or not line.startswith("run.json['run_id']")


def moved_on(model: Any, output_dir: Path, checkpoint: Path) -> list[str]:
    """What a finished run did when it was started again; it should do nothing."""
    weights = load_file(next(checkpoint.glob("*model.safetensors")))
    state = {name.replace(".default.", "."): tensor for name, tensor in model.state_dict().items()}
    changed = [name for name, tensor in weights.items() if not torch.equal(state[name], tensor)]
    return changed + [path.name for path in output_dir.glob("checkpoint-*")]


def on_one_process_only(folder: Path, **options: Any) -> dict[str, list[Any]]:
    """What all processes make of a signal and of a full disk that the second one alone has met."""
    trainer = make_trainer(folder / "signalled", **{**options, "save_steps": 1000})
    second = trainer.accelerator.process_index == 1
    if second:
        trainer.add_callback(SignalAt(trainer, 1))
    trainer.train()
    steps = gather_object([trainer.state.global_step])
    saved = (folder / "signalled" / "checkpoint-1" / "manifest.json").exists()
    if second:
        trainer.progress = full_disk  # type: ignore[method-assign]
    try:
        trainer._save_checkpoint(trainer.model, None)
        outcome = "saved"
    except CheckpointError:
        outcome = "failed"
    outcomes = gather_object([outcome])
    left = [path.name for path in (folder / "signalled").iterdir() if path.name.startswith(".")]
    return {"signal": [*steps, saved], "full disk": [*outcomes, *left]}


class SignalAt(TrainerCallback):
    """What the handler of a signal does, in one process."""

    def __init__(self, trainer: Any, step: int):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.trainer.preemption.signal = "SIGTERM"


def worker(folder: str, names: list[str]) -> None:
    """Both of the above under torchrun, for some of the configurations."""
    for name in names:
        options = {**CONFIGURATIONS[name], "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
        result = interrupted_everywhere(Path(folder, name), **options)
        one_only = on_one_process_only(Path(folder, name), **options)
        if result:
            Path(folder, name, "result.json").write_text(json.dumps(result | one_only), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bit_equal_at_every_step(name: str, tmp_path: Path) -> None:
    found = interrupted_everywhere(tmp_path, **CONFIGURATIONS[name])
    assert len(found) == CONFIGURATIONS[name]["max_steps"] + 1
    assert {where: lines for where, lines in found.items() if lines} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bit_equal_at_every_step_on_two_processes(tmp_path: Path) -> None:
    names = ["iterations", "epochs"]
    called(worker, tmp_path, names)
    for name in names:
        found = json.loads((tmp_path / name / "result.json").read_text())
        assert found.pop("signal") == [1, 1, True], "a signal to one process stops all at the same step, after a save"
        assert found.pop("full disk") == ["failed", "failed"], "a save that fails in one process fails in all"
        assert len(found) == CONFIGURATIONS[name]["max_steps"] + 1
        assert {where: lines for where, lines in found.items() if lines} == {}
        assert (tmp_path / name / "whole" / "checkpoint-1" / "progress_1.json").exists()


def change_weight(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] += 1e-7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.safetensors['transformer.wte.weight']"


def drop_file(folder: Path) -> str:
    (folder / "scheduler.pt").unlink()
    return "scheduler.pt: only in one"


CHANGES = [change_weight, drop_file]


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
