"""One global batch on one process and on two gives the same weights, KL, coefficient and advantages."""

import os
import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.gates import weights_gate
from rookworld_trl.training.sampler import Samples
from tests.support.builders import random_gpt2
from tests.support.plugged import plugged
from tests.support.processes import called
from tests.training.conftest import PROMPTS, share_of_letters

SETTINGS: dict[str, dict[str, Any]] = {
    "control": {"advantage_baseline": "ema", "kl_control": "multiplicative", "kl_target": 1e-4, "kl_interval": 1},
    "gae": {"use_gae": True, "gradient_accumulation_steps": 1},
    "mining": {"mining": True, "mining_rounds": 2, "task_sampling": {"a": {"temperature": 0.7}}},
    "mixed": {"objective": "mixed", "scale_rewards": "group", "beta": 0.05, "gradient_accumulation_steps": 1},
}
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


def worker(checkpoint: str, folder: str) -> None:
    """`train` by each of the settings, alone or under torchrun."""
    for name, options in SETTINGS.items():
        train(checkpoint, f"{folder}/{name}", options)


def train(checkpoint: str, output: str, options: dict[str, Any]) -> None:
    """Three steps of the toy task; what came out goes to a file."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tasks = ["p", "p", "a", "p", "a", "p", "a", "p"]
    options, plugins = plugged(options)
    small = {"per_device_train_batch_size": 8 // processes, "num_generations": 4, "max_completion_length": 6}
    small |= {"max_steps": 3, "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    small |= {"optim": "sgd"}  # Adam would turn rounding of a zero gradient into a whole step
    small |= {"use_cpu": True, "ddp_backend": "gloo" if processes > 1 else None, "save_strategy": "no", "seed": 1}
    args = RookWorldGRPOConfig(output_dir=f"{output}-run", disable_tqdm=True, **small, **options)
    data = Dataset.from_dict({"prompt": PROMPTS, "task": tasks})
    find = None if args.objective == "sampled" else find_points
    policy = GPT2LMHeadModel.from_pretrained(checkpoint)
    trainer = RookWorldGRPOTrainer(
        policy, share_of_letters, args, data, None, tokenizer, find_points=find, plugins=plugins
    )
    trainer.sampler.sample = fixed  # type: ignore[method-assign]
    trainer.gates.pending = False  # they compare with a real sampler
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        keys = ("kl", "kl/coefficient", "kl/sequence_p95", "reward", "groups/informative", "value/error", "exact/value")
        log = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history if "loss" in row]
        torch.save({"weights": weights, "log": log}, Path(output))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_equal_one(
    policy: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy.save_pretrained(tmp_path / "start")
    tiny_tokenizer.save_pretrained(tmp_path / "start")
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        called(worker, tmp_path / "start", tmp_path / str(count), processes=count)
    start = policy.state_dict()
    for name in SETTINGS:
        one, two = (torch.load(tmp_path / count / name, weights_only=True) for count in ("1", "2"))
        assert len(one["log"]) == 3
        for alone, together in zip(one["log"], two["log"], strict=True):
            assert alone.keys() == together.keys()
            assert together == pytest.approx(alone, rel=1e-5, abs=1e-5), name
        moved = max((one["weights"][key] - start[key]).abs().max().item() for key in start)
        apart = max((one["weights"][key] - two["weights"][key]).abs().max().item() for key in start)
        assert moved > 1e-3
        assert apart < 1e-5, name


def gates_of_shards(store: str) -> None:
    """A pass leaves the outermost weights gathered, in bf16; the shards beneath are float32 and keep small updates."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    model = random_gpt2(seed=1, initializer_range=0.3).eval()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    sharded: Any = fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy, reshard_after_forward=False)
    with torch.no_grad():
        logits = sharded(torch.tensor([[3, 4, 5]])).logits
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, "the case that is meant"
    assert weights_gate(model, 1e-5).measured < 0.01
    with torch.no_grad():
        assert torch.equal(sharded(torch.tensor([[3, 4, 5]])).logits, logits)
    os._exit(0)  # the mesh keeps its group, which `leave` would complain of


@pytest.mark.slow
def test_the_weights_of_shards_are_those_that_the_optimizer_changes(tmp_path: Path) -> None:
    called(gates_of_shards, tmp_path / "store", processes=1)
