"""Interrupts a toy run after every step, alone or under torchrun, and says where the resumed run's end differs."""

import errno
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from transformers import TrainerCallback

from rookworld_trl.checkpointing.store import CheckpointError
from tests.faults.gloo import leave
from tests.faults.toy import make_trainer
from tests.support.checkpoint_diff import differences

# Each adds a way in which a run's state can be lost.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "logging_steps": 3,
        "lr_scheduler_type": "cosine",
        "advantage_baseline": "adaptive",
        "log_completions": True,
    },
    "iterations": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 7,
        "logging_steps": 2,
        "kl_control": "multiplicative",
        "kl_target": 1e-4,
        "kl_interval": 3,
    },
    "epochs": {
        "rows": 6,
        "shuffle_dataset": True,
        "max_steps": 8,
        "reference_reset_steps": 3,
        "rollout_backend": "transformers",
        "use_adaptive_entropy": True,
        "entropy_target": 1.0,
    },
    "value head": {
        "use_gae": True,
        "max_steps": 4,
        "lr_schedule": "advanced",
        "weight_decay": 0.1,
        "num_iterations": 2,
    },
    "mining": {"mining": True, "rows": 16, "max_steps": 5, "gradient_accumulation_steps": 2, "num_iterations": 2},
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
        trainer._progress = full_disk  # type: ignore[method-assign]
    try:
        trainer.save_special("debug")
        outcome = "saved"
    except CheckpointError:
        outcome = "failed"
    outcomes = gather_object([outcome])
    left = [path.name for path in (folder / "signalled").iterdir() if path.name.startswith((".", "debug"))]
    return {"signal": [*steps, saved], "full disk": [*outcomes, *left]}


def full_disk() -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


class SignalAt(TrainerCallback):
    """What the handler of a signal does, in one process."""

    def __init__(self, trainer: Any, step: int):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.trainer.preemption.signal = "SIGTERM"


if __name__ == "__main__":
    result = interrupted_everywhere(Path(sys.argv[2]), **json.loads(sys.argv[1]))
    one_only = on_one_process_only(Path(sys.argv[2]), **json.loads(sys.argv[1]))
    if result:
        result |= one_only
        Path(sys.argv[2], "result.json").write_text(json.dumps(result), encoding="utf-8")
    leave()
