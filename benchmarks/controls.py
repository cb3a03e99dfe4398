"""What do the trainer's controls cost? One step with all of them beside the same step without, in turn, medians.

    python benchmarks/controls.py [--rounds 5] [--steps 11] [--prompts 20] [--samples 16]

On: adaptive KL control with warm-up, KL stop, adaptive baseline, the advanced schedule, health bands with events, the
truth's log-prob every ten steps, throughput and MFU, recovery from NaN with its snapshots. Off: the same trainer with a
fixed beta and none of the others. Both keep the reference model and the KL term, which are the method, not its control.
The learning rate is 0, so that both sides sample, score and learn from the same completions. A round is all steps but
the first, which runs the gates; eleven steps hold one look at the truth's log-prob, as in any run. Without a GPU the
seconds are those of the CPU, which other work on the machine does not stretch.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

import rookworld_trl
from rookworld_trl import rewards
from rookworld_trl.data import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.modeling.loading import load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.monitor import DEFAULT_BANDS

SHIPPED = Path(rookworld_trl.__file__).parent / "assets" / "nano"
SECONDS = time.perf_counter if torch.cuda.is_available() else time.process_time
OUTPUT = Path(__file__).parent / "results" / "controls.json"

ON: dict[str, Any] = {
    "kl_control": "multiplicative",
    "kl_interval": 1,
    "kl_warmup_steps": 2,
    "advantage_baseline": "adaptive",
    "lr_schedule": "advanced",
    "peak_tflops": 1.0,
}
OFF: dict[str, Any] = {
    "kl_stop_threshold": 0.0,
    "recovery": False,
    "truth_rows": 0,
    "health_bands": dict.fromkeys(DEFAULT_BANDS),
}


class Clock(TrainerCallback):
    """Starts each step's time, or, given the one that started it, takes it."""

    def __init__(self, starts: "Clock | None" = None) -> None:
        self.starts = starts
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = SECONDS()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.starts is not None:
            self.seconds.append(SECONDS() - self.starts.started)


def run(arguments: argparse.Namespace, plan: Any, controls: bool) -> float:
    """Mean seconds of all steps but the first."""
    set_seed(1)
    model, tokenizer = load(str(SHIPPED))
    with tempfile.TemporaryDirectory() as folder:
        args = RookWorldGRPOConfig(
            output_dir=folder,
            num_generations=arguments.samples,
            per_device_train_batch_size=arguments.prompts * arguments.samples,
            max_completion_length=80,
            learning_rate=0.0,
            max_steps=arguments.steps,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=1,
            **(ON if controls else OFF),
        )
        functions = [rewards.policy_reward_continuous, rewards.environment_reward_continuous]
        trainer = RookWorldGRPOTrainer(model, functions, args, plan, None, tokenizer)
        if not controls:
            for callback in (trainer.health, trainer.truth_probe, trainer.throughput):
                trainer.remove_callback(callback)
            trainer.throughput.counts = False
        first = Clock()
        trainer.callback_handler.callbacks.insert(0, first)  # starts before all others ...
        last = Clock(first)
        trainer.add_callback(last)  # ... which end before this one
        trainer.train()
    return statistics.mean(last.seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    plan = mix(load_shipped("train"), 0.2, prompts_per_batch=arguments.prompts, batches=arguments.steps, seed=1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(arguments.rounds):
        for controls in (False, True) if number % 2 == 0 else (True, False):
            seconds[controls].append(run(arguments, plan, controls))
    ratios = [on / off for off, on in zip(seconds[False], seconds[True], strict=True)]
    report = {
        "seconds_per_step": {"off": statistics.median(seconds[False]), "on": statistics.median(seconds[True])},
        "overhead": round(statistics.median(ratios) - 1, 4),
        "overhead_of_each_round": [round(ratio - 1, 4) for ratio in ratios],
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
