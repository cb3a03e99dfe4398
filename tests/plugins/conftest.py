"""The toy task of the trainer's tests, and what several tests read of a run."""

from typing import Any

import torch

from rookworld_trl.training import RookWorldGRPOTrainer
from tests.training.conftest import make_trainer, options, policy, prompts

__all__ = ["batch_of", "make_trainer", "options", "policy", "prompts", "rates"]


def batch_of(trainer: RookWorldGRPOTrainer) -> tuple[dict[str, Any], torch.Tensor]:
    """The first generation batch, with each completion's reward."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    return batch, trainer._rewards


def rates(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
