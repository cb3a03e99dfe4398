"""GRPO training that checks its own numbers. Knows no chess: rewards and evaluators come in as arguments."""

import warnings

from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.gates import GateError
from rookworld_trl.training.plugin import Plugin
from rookworld_trl.training.trainer import RookWorldGRPOTrainer

__all__ = ["GateError", "Plugin", "RookWorldGRPOConfig", "RookWorldGRPOTrainer"]

# TRL 1.16 asks models by the old name of a property, at every generation, of which transformers 5.23 warns.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
