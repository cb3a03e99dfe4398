"""Trains the toy task for three steps, alone or under torchrun, and writes what came out; see test_two_processes.py."""

import json
import os
import random
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2LMHeadModel

from rookworld_trl.checkpointing.exits import close_process_group
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.sampler import Samples

PROMPTS = ["P: a", "P: abcdefgh", "A: e", "P: aa bb cc dd", "A: 1234567890", "P: b", "A: h1h2", "P: kqr"]

TOKENS = 42  # of the tests' tokenizer


def fixed(prompt_ids: list[list[int]], *_: Any, **__: Any) -> Samples:
    """Completions depend on the prompt and on the number in the group alone, so that both runs see the same batch."""
    samples = Samples.blank(len(prompt_ids))
    samples.prompt_ids, samples.completion_ids = prompt_ids, []
    for prompt, run in groupby(prompt_ids):
        for number, _row in enumerate(run):
            dice = random.Random(f"{prompt} {number}")
            samples.completion_ids.append([dice.randrange(3, TOKENS) for _ in range(dice.randint(1, 6))])
    return samples


def share_of_letters(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]


def find_points(row: dict[str, Any], completion: list[int]) -> dict[str, Any]:
    """Two actions behind the first token, one of two tokens; a right end where the completion ends; a sampled rest."""
    if row["task"] == "a":
        return {
            "decisions": [{"position": 0, "actions": [[5, 6], [9]], "rewards": [1.0, 0.4]}],
            "rest_is_sampled": True,
        }
    at = min(1, len(completion) - 1)
    decision = {"position": at, "actions": [[7], [8, 4]], "rewards": [1.0, -0.5], "otherwise": 0.1}
    return {"decisions": [decision], "determined": [{"position": len(completion) - 1, "tokens": [1], "weight": 0.3}]}


def main(checkpoint: str, output: str, options: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tasks = ["p", "p", "a", "p", "a", "p", "a", "p"]
    args = RookWorldGRPOConfig(
        output_dir=f"{output}-run",
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        per_device_train_batch_size=8 // processes,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        learning_rate=0.5,
        optim="sgd",  # Adam would turn rounding of a zero gradient into a whole step
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        **json.loads(options),
    )
    trainer = RookWorldGRPOTrainer(
        GPT2LMHeadModel.from_pretrained(checkpoint),
        share_of_letters,
        args,
        Dataset.from_dict({"prompt": PROMPTS, "task": tasks}),
        None,
        tokenizer,
        find_points=None if args.objective == "sampled" else find_points,
    )
    trainer.sampler.sample = fixed  # type: ignore[method-assign]
    trainer.gates.pending = False  # they compare with a real sampler
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        keys = ("kl", "kl/coefficient", "kl/sequence_p95", "reward", "groups/informative", "value/error", "exact/value")
        log = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history if "loss" in row]
        torch.save({"weights": weights, "log": log}, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
