"""What do the trainer's controls cost? One step with all of them beside the same step without, medians.

    python -m benchmarks.controls [--rounds 6] [--steps 10] [--prompts 60] [--samples 16] [--micro-batches 8]

On: adaptive KL control with warm-up, KL stop, adaptive baseline, the advanced schedule, health bands with events, the
truth's log-prob every ten steps, throughput and MFU, recovery from NaN with its snapshots. Off: the same trainer with a
fixed beta and none of the others. Both keep the reference model and the KL term, which are the method, not its control.
The learning rate is 0, so that both sides sample, score and learn from the same completions.

Each side is a process of its own, and the two take their steps in turn: what slows the machine for a while slows both.
A process can be a few per cent slower than its twin for all of its life; so each round starts new ones. A step is
everything from its beginning to the next one's. Ten steps hold one look at the truth's log-prob, as in any run; the
first step, which runs the gates, is left out. Without a GPU the seconds are those of the CPU, which other work on the
machine does not stretch, with one thread a side, for a thread that waits for others counts as busy. The interval of the
overhead comes from drawing the rounds again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.common import RESULTS, REWARDS, ROOT, best_device, machine, write_report
from rookworld_trl.data import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.evaluation.intervals import bootstrap_ratios, percentile_interval
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.monitor import DEFAULT_BANDS

# Of each side; None: as many as torch takes.
THREADS = None if torch.cuda.is_available() else 1
SECONDS = time.perf_counter if torch.cuda.is_available() else time.process_time
OUTPUT = RESULTS / "controls.json"

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
    "target_rows": 0,
    "health_bands": dict.fromkeys(DEFAULT_BANDS),
}


class Baton(TrainerCallback):
    """Before each step, says how many seconds have gone by and waits for its turn."""

    def __init__(self, channel: TextIO):
        self.channel = channel

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        print(SECONDS(), file=self.channel, flush=True)
        if not sys.stdin.readline():
            sys.exit("the other side is gone")


def train(arguments: argparse.Namespace) -> None:
    """One side, in its own process."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what the trainer prints
    logging.set_verbosity_error()
    steps = arguments.steps + 2  # the first runs the gates, the last only ends the one before it
    plan = mix(load_shipped("train"), 0.2, prompts_per_batch=arguments.prompts, batches=steps, seed=1)
    set_seed(1)
    model, tokenizer = load(NANO)
    with tempfile.TemporaryDirectory() as folder:
        args = RookWorldGRPOConfig(
            output_dir=folder,
            num_generations=arguments.samples,
            per_device_train_batch_size=arguments.prompts * arguments.samples // arguments.micro_batches,
            gradient_accumulation_steps=arguments.micro_batches,
            max_completion_length=80,
            learning_rate=0.0,
            max_steps=steps,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            disable_tqdm=True,
            seed=1,
            **(ON if arguments.side == "on" else OFF),
        )
        trainer = RookWorldGRPOTrainer(model, REWARDS, args, plan, None, tokenizer)
        if arguments.side == "off":
            for callback in (trainer.health, trainer.target_probe, trainer.throughput):
                trainer.remove_callback(callback)
            trainer.throughput.counts = False
        trainer.callback_handler.callbacks.insert(0, Baton(channel))  # before all others
        trainer.train()


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of one round of both sides, which take their steps in turn."""
    sides: dict[str, subprocess.Popen[str]] = {}
    try:
        for side in ("off", "on"):
            command = [sys.executable, "-m", "benchmarks.controls", "--side", side]
            for name in ("steps", "prompts", "samples", "micro_batches"):
                command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
            environment = os.environ | ({"OMP_NUM_THREADS": str(THREADS)} if THREADS else {})
            sides[side] = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        clocks = {side: [_clock(process)] for side, process in sides.items()}
        for number in range(arguments.steps + 1):
            for side in sorted(sides, reverse=number % 2 == 0):
                stdin = sides[side].stdin
                assert stdin is not None
                print("go", file=stdin, flush=True)
                clocks[side].append(_clock(sides[side]))
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    # The first step runs the gates.
    return {side: [after - before for before, after in pairwise(c[1:])] for side, c in clocks.items()}


def _clock(process: "subprocess.Popen[str]") -> float:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a side ended early: see its message above")
    return float(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="timed ones of a round")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--side", choices=("off", "on"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        train(arguments)
        return
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        seconds = measure(arguments)
        rounds.append({side: statistics.mean(values) for side, values in seconds.items()})
        print(json.dumps(rounds[-1]), flush=True)
        write_report(arguments.output, report(rounds, arguments))
    print(arguments.output.read_text())


def report(rounds: list[dict[str, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    on, off = (np.array([[both[side]] for both in rounds]) for side in ("on", "off"))
    low, high = percentile_interval(bootstrap_ratios(on, off)[:, 0])
    return {
        "seconds_per_step": {"off": round(float(np.median(off)), 4), "on": round(float(np.median(on)), 4)},
        "overhead": round(float(on.sum() / off.sum()) - 1, 4),
        "overhead_95": [round(low - 1, 4), round(high - 1, 4)],
        "overhead_of_each_round": [round(both["on"] / both["off"] - 1, 4) for both in rounds],
        "steps_a_round": arguments.steps,
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        **machine(best_device()),
        "threads": THREADS or torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
