"""The toy task of the trainer's tests."""

from tests.training.conftest import make_trainer, options, policy, prompts

__all__ = ["make_trainer", "options", "policy", "prompts"]
