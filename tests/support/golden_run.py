"""rookworld-nano for a dozen steps with every control on: run twice, or by two versions of the code, nothing differs.

    python tests/support/golden_run.py <variant> <folder> [<checkpoint to resume from>]

Variants of two processes are started by torchrun. What is compared are the checkpoints, value by value, and the log.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from rookworld_trl.chess import rewards
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

try:
    from rookworld_trl.plugins import split
except ImportError:  # the package of a commit before there were any
    split = lambda options: (options, [])  # noqa: E731

CONTROLS: dict[str, Any] = {
    "max_steps": 12,
    "save_steps": 6,
    "mining": True,
    "kl_control": "multiplicative",
    "kl_target": 1e-4,
    "kl_interval": 2,
    "kl_warmup_steps": 2,
    "task_sampling": {"environment": {"temperature": 0.8, "max_completion_length": 60}},
    "recovery_snapshot_steps": 2,
    "lr_schedule": "advanced",
    "faults": {4: "loss", 9: "rewards"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "controls": CONTROLS,
    "gae": {
        "max_steps": 6,
        "save_steps": 3,
        "use_gae": True,
        "num_iterations": 2,
        "kl_type": "reference_to_policy",
        "kl_estimator": "k1",
        "rollout_backend": "transformers",
        "log_completions": True,
        "faults": {2: "loss"},  # before the save: each start makes a good state of its own
    },
    "baseline": {
        "max_steps": 4,
        "save_steps": 2,
        "advantage_baseline": "ema",
        "task_sampling": {"environment": {"temperature": 0.8}},
        "kl_type": "symmetric",
        "kl_estimator": "k2",
        "share_prefixes": False,
        "num_iterations": 2,
        "faults": {},
    },
    "adapters": {
        "max_steps": 3,
        "save_steps": 2,
        "use_peft": True,
        "lora_r": 2,
        "num_iterations": 2,
        "faults": {2: "loss"},
    },
}
VARIANTS["two processes"] = {**CONTROLS, "max_steps": 8, "save_steps": 4, "ddp_backend": "gloo"}


class Faults(TrainerCallback):
    """A loss of NaN, or rewards of NaN, at given steps (counted from 1)."""

    def __init__(self, trainer: RookWorldGRPOTrainer, plan: dict[int, str]):
        self.trainer, self.plan, self.now = trainer, plan, ""
        step, functions = trainer.training_step, trainer.reward_funcs
        trainer.training_step = lambda *args, **kwargs: self.broken(step(*args, **kwargs))  # type: ignore[method-assign]
        trainer.reward_funcs = [self.unusable(each) for each in functions]
        trainer.add_callback(self)

    def broken(self, loss: torch.Tensor) -> torch.Tensor:
        if self.now == "loss":
            next(each for each in self.trainer.model.parameters() if each.grad is not None).grad.fill_(torch.nan)
        return loss

    def unusable(self, function: Any) -> Any:
        def reward(**columns: Any) -> list[float | None]:
            values = function(**columns)
            return [torch.nan if self.now == "rewards" and value is not None else value for value in values]

        reward.__name__ = function.__name__
        return reward

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = self.plan.get(state.global_step + 1, "")


def prompts() -> Dataset:
    """Rows of both tasks in turn, the first ones of the data that is shipped."""
    rows = load_shipped("train")
    parts = [
        rows.filter(lambda row, task=task: row["task"] == task).select(range(64)) for task in ("policy", "environment")
    ]
    return Dataset.from_list([row for pair in zip(*parts, strict=True) for row in pair])


def trainer_of(variant: str, folder: Path) -> RookWorldGRPOTrainer:
    torch.set_num_threads(1)
    changes = dict(VARIANTS[variant])
    faults = changes.pop("faults")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 8 // processes,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 80,
        "learning_rate": 2e-4,
        "shuffle_dataset": False,
        "scale_rewards": "batch",
        "target_every": 3,
        "target_rows": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
        **changes,
    }
    model, tokenizer = load(NANO)
    functions = [rewards.policy_reward, rewards.environment_reward]
    options, made = split(options)
    more: Any = {"plugins": made} if made else {}
    args = RookWorldGRPOConfig(**options)
    trainer = RookWorldGRPOTrainer(model, functions, args, prompts(), processing_class=tokenizer, **more)
    Faults(trainer, faults)
    return trainer


def main(variant: str, folder: str, checkpoint: str | None = None) -> None:
    trainer = trainer_of(variant, Path(folder))
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.accelerator.is_main_process:
        Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
