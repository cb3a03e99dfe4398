"""Does prompt mining raise the share of informative groups, and what does it cost?

    python -m benchmarks.mining [--reward exact graduated] [--steps 6] [--prompts 20] [--samples 8]

rookworld-nano on its shipped prompts, a fifth of them `A:`, trained from the same weights with the same plan,
plainly and with mining. A group is informative if its rewards differ. `exact` rewards pass or fail (1 for a completion
that earns the full graduated reward, else 0): there most groups agree. Prints one line for each reward, writes JSON.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from benchmarks.common import RESULTS, StepClock, machine, write_report
from benchmarks.common import REWARDS as CONTINUOUS
from rookworld_trl import rewards
from rookworld_trl.data import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

OUTPUT = RESULTS / "mining.json"
GRADUATED = [rewards.policy_reward, rewards.environment_reward]


def passes(function: Callable[..., list[float | None]]) -> Callable[..., list[float | None]]:
    """1 where the reward is full, else 0."""

    def exact(**columns: Any) -> list[float | None]:
        return [None if value is None else float(value >= 1.0) for value in function(**columns)]

    exact.__name__ = f"exact_{function.__name__}"
    return exact


REWARDS = {"exact": [passes(each) for each in GRADUATED], "graduated": GRADUATED, "continuous": CONTINUOUS}


def run(arguments: argparse.Namespace, reward: str, mining: bool) -> dict[str, float]:
    """Means over the run's steps, but for the median step time."""
    set_seed(1)
    model, tokenizer = load(NANO)
    data = load_shipped("train")
    plan = mix(data, 0.2, prompts_per_batch=arguments.prompts, batches=arguments.pool, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        args = RookWorldGRPOConfig(
            output_dir=folder,
            mining=mining,
            mining_rounds=arguments.rounds,
            num_generations=arguments.samples,
            per_device_train_batch_size=arguments.prompts * arguments.samples,
            max_completion_length=80,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_steps=arguments.steps,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            target_rows=0,
            seed=1,
        )
        trainer = RookWorldGRPOTrainer(model, REWARDS[reward], args, plan, None, tokenizer)
        times = StepClock()
        trainer.add_callback(times)
        trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    names = ("groups/informative", "groups/informative/policy", "groups/informative/environment", "reward")
    names += ("mining/ordinary_informative", "mining/resampled", "mining/pass_rate") if mining else ()
    result = {name: statistics.mean(row[name] for row in log if name in row) for name in names}
    return result | {"seconds_per_step": statistics.median(times.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", nargs="+", default=["exact", "graduated"], choices=sorted(REWARDS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pool", type=int, default=100, help="batches of prompts to draw from")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    results = []
    for reward in arguments.reward:
        plain, mined = (run(arguments, reward, mining) for mining in (False, True))
        row = {"reward": reward, "plain": plain, "mined": mined}
        row["informative_share_raised_by"] = round(mined["groups/informative"] / plain["groups/informative"] - 1, 3)
        row["informative_groups_per_second_raised_by"] = round(
            (mined["groups/informative"] / mined["seconds_per_step"])
            / (plain["groups/informative"] / plain["seconds_per_step"])
            - 1,
            3,
        )
        print(json.dumps(row), flush=True)
        results.append(row)
    settings = {name: getattr(arguments, name) for name in ("steps", "prompts", "samples", "rounds", "pool")}
    write_report(arguments.output, {"settings": settings, **machine("cpu"), "results": results})


if __name__ == "__main__":
    main()
