"""What do checkpoints and snapshots cost: share of training time, memory, and time until a killed run trains again?

    python -m benchmarks.checkpointing [--size nano] [--size 124m] [--prompts 16] [--samples 16] [--steps 6]

Trains a few steps on shipped prompts with a checkpoint after each, and times every part where it happens: saving
(written, synced, hashed, renamed), making stable (copied, verified), snapshots in memory that a NaN goes back to. The
share of training time is that of one checkpoint and one stable copy in `--interval` steps, and of the snapshots in
between, to as many steps. Restoration is all that comes between the end of the imports and the first resumed step:
building the trainer, verifying, loading; the weights have random values, which cost the same. Small batches make steps
short, and so the share large: the recipes' batches are several times as big.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from rookworld_trl import rewards
from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.resume import choose_start
from rookworld_trl.checkpointing.snapshots import Snapshots
from rookworld_trl.data import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

RESULTS = Path(__file__).parent / "results" / "checkpointing.json"
DEFAULT_INTERVAL = int(RookWorldGRPOConfig.save_steps)


class Clock(TrainerCallback):
    """Wall seconds of each step, and of each call of the functions it watches."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.first_step = 0.0
        self._start = 0.0

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        calls = self.seconds.setdefault(name, [])

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls.append(time.perf_counter() - started)

        setattr(owner, name, timed)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self.first_step = self.first_step or self._start

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.setdefault("step", []).append(time.perf_counter() - self._start)


def tensor_bytes(tree: Any) -> int:
    """Memory of all tensors in nested containers and attributes of `tree`."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(tensor_bytes, tree.values()))
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


class Memory(TrainerCallback):
    """Most memory that a trainer's snapshots held at the end of a step, bytes."""

    def __init__(self, trainer: RookWorldGRPOTrainer):
        self.trainer, self.most = trainer, 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.most = max(self.most, tensor_bytes(vars(self.trainer.guard._snapshots)))


def build(size: str, output_dir: Path, arguments: argparse.Namespace, **changes: Any) -> RookWorldGRPOTrainer:
    model, tokenizer = load(NANO)
    if size == "124m":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=0))
    order = {"prompts_per_batch": arguments.prompts, "batches": arguments.steps, "seed": 1}
    args = RookWorldGRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=arguments.prompts * arguments.samples // 4,
        gradient_accumulation_steps=4,
        num_generations=arguments.samples,
        max_completion_length=64,
        max_steps=arguments.steps,
        kl_stop_threshold=0,
        activation_checkpointing=False,
        shuffle_dataset=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        save_steps=1,
        save_total_limit=2,
        stable_after_steps=1,
        **changes,
    )
    prompts = mix(load_shipped("train"), 0.25, **order)
    functions = [rewards.policy_reward_continuous, rewards.environment_reward_continuous]
    return RookWorldGRPOTrainer(model, functions, args, prompts, processing_class=tokenizer)


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        output_dir = Path(name)
        trainer, clock = build(size, output_dir, arguments), Clock()
        originals = (store.promote, Snapshots.take)
        clock.watch(trainer, "write_checkpoint")
        clock.watch(store, "promote")
        clock.watch(Snapshots, "take")
        memory = Memory(trainer)
        for callback in (clock, memory):
            trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            store.promote, Snapshots.take = originals  # type: ignore[method-assign]
        parameters = trainer.model.num_parameters()
        newest = store.list_checkpoints(output_dir)[0]
        disk = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        started = time.perf_counter()
        assert store.verify(newest, finite=True) == []
        verifying = time.perf_counter() - started
        del trainer

        started = time.perf_counter()
        resumed, after = build(size, output_dir, arguments, auto_resume=True), Clock()
        built = time.perf_counter()
        resumed.args.max_steps += 1
        start = choose_start(resumed.args)
        resumed.add_callback(after)
        resumed.train(resume_from_checkpoint=start.checkpoint)
        every = resumed.args.recovery_snapshot_steps
    median = {name: statistics.median(calls[1:] or calls) for name, calls in clock.seconds.items()}
    interval = arguments.interval
    saving, snapshots = median["write_checkpoint"] + median["promote"], median["take"] * interval / every
    return {
        "parameters": parameters,
        "step_seconds": round(median["step"], 2),
        "completions_a_step": arguments.prompts * arguments.samples,
        "save_seconds": round(median["write_checkpoint"], 3),
        "make_stable_seconds": round(median["promote"], 3),
        "snapshot_seconds": round(median["take"], 3),
        "interval": interval,
        "snapshot_interval": every,
        "checkpoint_share_percent": round(100 * saving / (interval * median["step"]), 3),
        "snapshot_share_percent": round(100 * snapshots / (interval * median["step"]), 3),
        "disk_megabytes": round(disk / 1e6, 1),
        "snapshot_megabytes": round(memory.most / 1e6, 1),
        "verify_seconds": round(verifying, 2),
        "build_seconds": round(built - started, 2),
        "restoration_seconds": round(after.first_step - started, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=["nano", "124m"], help="may be repeated; default: both")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--interval", type=int, default=DEFAULT_INTERVAL, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "sizes": {size: measure(size, arguments) for size in arguments.size or ["nano", "124m"]},
    }
    print(json.dumps(result, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
