"""How fast is an entire GRPO step beside stock TRL's? Same model, prompts, batch, rewards; in turn, medians.

    python -m benchmarks.step [--prompts 16] [--samples 16] [--env-ratio 0.25] [--rounds 3]

Three sides: `stock`, TRL's trainer as it is; `stock_positions`, the same with the position ids that left padding needs;
`ours`. Each trains on the CPU in float32, sampling, rewards, reference, loss with KL, backward pass and optimizer
included, one update a batch. A round makes a new trainer of each side and drops its first step, which warms up (and,
on our side, runs the gates). Dropout is off on all sides, or stock would do other work.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import ALIKE, RESULTS, REWARDS, StepClock, machine, shipped, write_report
from rookworld_trl.data.mixing import mix
from rookworld_trl.modeling.loading import NANO_FOLDER, load
from rookworld_trl.modeling.positions import install_position_hook
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

OUTPUT = RESULTS / "step.json"
SIDES = ("stock", "stock_positions", "ours")


def run(side: str, arguments: argparse.Namespace, seed: int) -> tuple[list[float], float]:
    """Seconds of the timed steps of one side, and the mean length of its completions in tokens."""
    model, tokenizer = load(arguments.model)
    rows = arguments.prompts * arguments.samples
    with tempfile.TemporaryDirectory() as folder:
        config = RookWorldGRPOConfig if side == "ours" else GRPOConfig
        args = config(
            output_dir=folder,
            per_device_train_batch_size=rows // arguments.micro_batches,
            gradient_accumulation_steps=arguments.micro_batches,
            num_generations=arguments.samples,
            max_completion_length=80,
            temperature=1.0,
            beta=0.01,
            learning_rate=1e-4,
            loss_type="dapo",
            scale_rewards="batch",
            max_steps=arguments.steps + 1,
            seed=seed,
            **ALIKE,
        )
        order = {"prompts_per_batch": arguments.prompts, "batches": arguments.steps + 1, "seed": seed}
        prompts = mix(shipped("train"), arguments.env_ratio, **order)
        trainer_class = RookWorldGRPOTrainer if side == "ours" else GRPOTrainer
        if side == "ours":
            trainer: GRPOTrainer = trainer_class(model, REWARDS, args, prompts, processing_class=tokenizer)
        else:  # stock loads its reference by name
            trainer = trainer_class(str(arguments.model), REWARDS, args, prompts, processing_class=tokenizer)
            if side == "stock_positions":
                install_position_hook(trainer.model)
                install_position_hook(trainer.ref_model)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        lengths = [
            log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log
        ]
    return clock.seconds[1:], statistics.mean(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO_FOLDER)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--env-ratio", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    lengths: dict[str, list[float]] = {side: [] for side in SIDES}
    for round_ in range(arguments.rounds):
        for side in SIDES:
            timed, length = run(side, arguments, seed=round_)
            seconds[side] += timed
            lengths[side].append(length)
            print(f"round {round_ + 1} {side}: {', '.join(f'{value:.2f}' for value in timed)} s", flush=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    report = {
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "env_ratio": arguments.env_ratio,
        "micro_batches": arguments.micro_batches,
        "timed_steps": {side: len(values) for side, values in seconds.items()},
        "seconds_per_step": {side: round(value, 3) for side, value in medians.items()},
        "speedup": {side: round(medians[side] / medians["ours"], 2) for side in SIDES if side != "ours"},
        "mean_completion_tokens": {side: round(statistics.mean(values), 1) for side, values in lengths.items()},
        **machine("cpu"),
    }
    print(json.dumps(report))
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
