"""A run of seconds: 2-layer GPT-2, letters for chess, a reward that depends on the text alone. No fixtures, so that
subprocesses can build it too."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from tests.support.builders import character_tokenizer, random_gpt2
from tests.support.plugged import plugged

LETTERS = "abcdefghkqr"
QUICK = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "activation_checkpointing": False}


def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(" :PA12345678" + LETTERS)


def policy() -> GPT2LMHeadModel:
    small = {"vocab_size": len(tokenizer()), "n_positions": 32, "n_embd": 16}
    return random_gpt2(seed=1, initializer_range=0.3, **small)


def prompts(count: int) -> Dataset:
    texts = [f"{'PA'[row % 2]}: {LETTERS[row % 11] * (row % 5 + 1)}{row % 8 + 1}" for row in range(count)]
    return Dataset.from_dict({"prompt": texts, "task": ["pa"[row % 2] for row in range(count)]})


def share_of_letters(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(str.isalpha, text)) / max(1, len(text)) + 0.01 * len(text) for text in completions]


def make_trainer(
    output_dir: Path,
    rows: int = 32,
    reward: Any = share_of_letters,
    data: Dataset | None = None,
    held_out: Dataset | None = None,
    **changes: Any,
) -> RookWorldGRPOTrainer:
    options: dict[str, Any] = {
        **QUICK,
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        **changes,
    }
    settings, plugins = plugged(options)
    args = RookWorldGRPOConfig(**settings)
    data = prompts(rows) if data is None else data
    return RookWorldGRPOTrainer(policy(), reward, args, data, held_out, tokenizer(), plugins=plugins)


class StopAt(TrainerCallback):
    """Ends training after a step, as an interruption that has been taken care of would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True
