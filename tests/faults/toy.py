"""A run of seconds: 2-layer GPT-2, letters for chess, a reward that depends on the text alone. No fixtures, so that
subprocesses can build it too."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.monitor import DEFAULT_BANDS

LETTERS = "abcdefghkqr"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *" :PA12345678", *LETTERS])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


def policy() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer()),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def prompts(count: int) -> Dataset:
    texts = [f"{'PA'[row % 2]}: {LETTERS[row % 11] * (row % 5 + 1)}{row % 8 + 1}" for row in range(count)]
    return Dataset.from_dict({"prompt": texts, "task": ["pa"[row % 2] for row in range(count)]})


def share_of_letters(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(str.isalpha, text)) / max(1, len(text)) + 0.01 * len(text) for text in completions]


def make_trainer(
    output_dir: Path, rows: int = 32, reward: Any = share_of_letters, data: Dataset | None = None, **changes: Any
) -> RookWorldGRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "kl_stop_threshold": 0.0,
        "health_bands": dict.fromkeys(DEFAULT_BANDS),
        **changes,
    }
    args = RookWorldGRPOConfig(**options)
    data = prompts(rows) if data is None else data
    return RookWorldGRPOTrainer(policy(), reward, args, data, processing_class=tokenizer())


class StopAt(TrainerCallback):
    """Ends training after a step, as an interruption that has been taken care of would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True
