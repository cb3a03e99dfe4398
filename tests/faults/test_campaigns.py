"""Random faults by the dozen, and what checkpoints cost: minutes each, run by `make test-long`.

Of a day when they ran, `benchmarks/results/faults.json` and `checkpointing.json` tell.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from rookworld_trl.checkpointing import store
from rookworld_trl.chess import rewards
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.mixing import mix
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.recovery import Snapshots
from tests.support.injection import STATE, Injector
from tests.support.toy import make_trainer

FEW_STATE = STATE.keys() - {"value head", "baseline"}  # which these runs do not have
KINDS = sorted(["loss", "loss value", "gradient", "late gradient", "log-probs", "rewards", *FEW_STATE])
GOOD_STEPS = 3  # that end a count of faults in a row, of which four are meant to end a run
LITTLE = 0.01  # of the time that steps take


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_random_faults_are_recovered_from(seed: int, tmp_path: Path) -> None:
    """Ten faults of random kinds, some steps apart: each step that is hit is skipped and leaves finite weights."""
    dice, step, planned = random.Random(seed), 0, []
    for _ in range(10):
        step += dice.randint(GOOD_STEPS + 1, 4 * GOOD_STEPS)
        planned.append((0, step, dice.choice(KINDS)))
    trainer = make_trainer(tmp_path, max_steps=step + GOOD_STEPS, save_strategy="no", seed=seed)
    injector = Injector(trainer, planned)
    trainer.train()
    assert trainer.state.global_step == step + GOOD_STEPS
    assert all(injector.finite.values())
    skipped = {event["step"] for event in events(tmp_path)}
    assert skipped == {step for _, step, _ in planned}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "recovery.jsonl").read_text(encoding="utf-8").splitlines()]


class StepSeconds(TrainerCallback):
    """Wall seconds of each step, without what is written after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_checkpoints_and_snapshots_take_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rookworld-nano, 16 prompts of 16 samples, shorter steps than the recipes': one checkpoint made stable in
    `save_steps` steps, and the snapshots in between."""
    seconds: dict[str, list[float]] = {}

    def watch(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.setdefault(name, []).append(time.perf_counter() - start)

        monkeypatch.setattr(owner, name, timed)

    model, tokenizer = load(NANO)
    args = RookWorldGRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=64,
        gradient_accumulation_steps=4,
        num_generations=16,
        max_completion_length=64,
        max_steps=6,
        activation_checkpointing=False,
        shuffle_dataset=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        save_steps=1,
        save_total_limit=2,
        stable_after_steps=1,
    )
    functions = [rewards.policy_reward_continuous, rewards.environment_reward_continuous]
    prompts = mix(load_shipped("train"), 0.25, prompts_per_batch=16, batches=6, seed=1)
    trainer = RookWorldGRPOTrainer(model, functions, args, prompts, processing_class=tokenizer)
    steps = StepSeconds()
    trainer.add_callback(steps)
    watch(trainer, "write_checkpoint")
    watch(store, "promote")
    watch(Snapshots, "take")
    trainer.train()
    cost = {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
    step, interval = statistics.median(steps.seconds[1:]), RookWorldGRPOConfig.save_steps
    assert cost["write_checkpoint"] + cost["promote"] < LITTLE * interval * step
    assert cost["take"] < LITTLE * args.recovery_snapshot_steps * step
