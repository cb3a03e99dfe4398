"""Toy prompts, a toy reward and a random GPT-2 whose log-probs depend on position enough to show errors."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from tests.support.builders import random_gpt2
from tests.support.plugged import plugged
from tests.support.toy import QUICK

PROMPTS = ["P: a", "P: abcdefgh", "A: e", "P: aa bb cc dd", "A: 1234567890", "P: b", "A: h1h2", "P: kqr"]


def share_of_letters(completions: list[str], **_: Any) -> list[float]:
    """A reward with nothing to do with chess: the share of lower-case letters."""
    return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture
def policy() -> GPT2LMHeadModel:
    """Dropout at GPT-2's 0.1, weights large enough that a shifted position changes the log-probs."""
    return random_gpt2(seed=1, initializer_range=0.3)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Arguments that both TRL's config and ours take, for runs of seconds."""
    return {
        **QUICK,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }


@pytest.fixture
def make_trainer(
    policy: GPT2LMHeadModel, prompts: Dataset, tiny_tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> Callable[..., RookWorldGRPOTrainer]:
    """Build our trainer on the toy task, around a copy of `policy`; keyword arguments go to its config and plug-ins,
    `_class`, `_model`, `_reward` and `_data` replace parts, `_find` and `_plugins` add some."""

    def make(
        _class: type[RookWorldGRPOTrainer] = RookWorldGRPOTrainer,
        _model: Any = None,
        _reward: Any = share_of_letters,
        _data: Any = None,
        _find: Any = None,
        _plugins: Any = (),
        **changes: Any,
    ) -> RookWorldGRPOTrainer:
        settings, plugins = plugged({**options, "rollout_backend": "transformers", **changes})
        return _class(
            model=copy.deepcopy(policy) if _model is None else _model,
            reward_funcs=_reward,
            args=RookWorldGRPOConfig(**settings),
            train_dataset=prompts if _data is None else _data,
            processing_class=tiny_tokenizer,
            find_points=_find,
            plugins=[*plugins, *_plugins],
        )

    return make


@pytest.fixture
def make_stock(
    policy: GPT2LMHeadModel,
    prompts: Dataset,
    tiny_tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    tmp_path: Path,
) -> Callable[..., GRPOTrainer]:
    """Build TRL's own trainer on the same task; its reference needs a name on disk."""

    def make(**changes: Any) -> GRPOTrainer:
        folder = tmp_path / "policy"
        policy.save_pretrained(folder)
        return GRPOTrainer(
            model=str(folder),
            reward_funcs=share_of_letters,
            args=GRPOConfig(**{**options, **changes}),
            train_dataset=prompts,
            processing_class=tiny_tokenizer,
        )

    return make
