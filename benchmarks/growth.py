"""Where does a step's time go, and how do time and memory grow with batch, group, length and model?

    python benchmarks/growth.py [--steps 3] [--model PATH] [--bf16]
    python benchmarks/growth.py --trace trace.json     # one profiled step of the first point, for chrome://tracing

Each point is a training run of its own in a process of its own (so that its peak memory is its own): a first step that
warms up and runs the gates, then `--steps` timed ones, mixed tasks, one update a batch. Prompts a batch and samples a
prompt vary with the shipped model; completion length and model size with random weights, which hardly ever end a
completion and so write exactly the length asked for. A phase's seconds are its own, without those of phases inside it.
`exponent` is the slope of log seconds against log size, least squares: 1 is linear growth.
"""

import argparse
import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.utils import logging

import rookworld_trl
from rookworld_trl import rewards
from rookworld_trl.data import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.modeling.loading import load
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.throughput import memory_gb

NANO = Path(rookworld_trl.__file__).parent / "assets" / "nano"
OUTPUT = Path(__file__).parent / "results" / "growth.json"
BASE = {"prompts": 8, "samples": 16, "tokens": 100, "size": None}
SERIES: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompts": value} for value in (4, 8, 16, 32)],
    "samples": [{"samples": value} for value in (8, 16, 32, 64)],
    "tokens": [{"tokens": value, "size": (4, 128)} for value in (20, 40, 80)],
    "size": [{"tokens": 40, "size": value} for value in ((4, 128), (8, 256), (12, 512))],
}


class Phases:
    """Seconds of each phase of a step, those of phases inside it left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = ["other"]
        self._since = time.perf_counter()

    def _account(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._account()
        self._stack.append(name)
        try:
            yield
        finally:
            self._account()
            self._stack.pop()

    def wrap(self, owner: Any, method: str, name: Callable[[], str]) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name()):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        self._account()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class StepPhases(TrainerCallback):
    def __init__(self, phases: Phases) -> None:
        self.phases, self.steps = phases, []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.phases.wrap(kwargs["optimizer"], "step", lambda: "optimizer")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.phases.take()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.phases.take())


def random_gpt2(like: GPT2Config, layers: int, width: int) -> GPT2LMHeadModel:
    config = GPT2Config(**like.to_dict() | {"n_layer": layers, "n_embd": width, "n_head": width // 32})
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def measure(point: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of one point's timed steps."""
    logging.disable_progress_bar()
    model, tokenizer = load(arguments.model)
    if point["size"]:
        model = random_gpt2(model.config, *point["size"])
    cuda = torch.cuda.is_available()
    before = memory_gb()
    with tempfile.TemporaryDirectory() as folder:
        args = RookWorldGRPOConfig(
            output_dir=folder,
            use_cpu=not cuda,
            bf16=arguments.bf16,
            per_device_train_batch_size=point["prompts"] * point["samples"],
            num_generations=point["samples"],
            max_completion_length=point["tokens"],
            beta=0.01,
            learning_rate=1e-6,
            scale_rewards="batch",
            max_steps=arguments.steps + 1,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        order = {"prompts_per_batch": point["prompts"], "batches": arguments.steps + 1, "seed": 0}
        prompts = mix(load_shipped("train"), 0.25, **order)
        functions = [rewards.policy_reward_continuous, rewards.environment_reward_continuous]
        trainer = RookWorldGRPOTrainer(model, functions, args, prompts, processing_class=tokenizer)
        phases = Phases()
        phases.wrap(trainer, "_generate_single_turn", lambda: "sampling")
        phases.wrap(trainer, "_calculate_rewards", lambda: "rewards")
        phases.wrap(
            trainer,
            "_get_per_token_logps_and_entropies",
            lambda: "forward" if torch.is_grad_enabled() else "reference",
        )
        phases.wrap(trainer, "_compute_loss", lambda: "loss")
        phases.wrap(trainer.accelerator, "backward", lambda: "backward")
        steps = StepPhases(phases)
        trainer.add_callback(steps)
        if arguments.trace:
            with torch.profiler.profile(record_shapes=True) as profile:
                trainer.train()
            profile.export_chrome_trace(str(arguments.trace))
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
        else:
            trainer.train()
        logs = trainer.state.log_history
    timed = steps.steps[1:]
    totals = [sum(step.values()) for step in timed]
    names = sorted({name for step in timed for name in step})
    metric = {key: [log[key] for log in logs if key in log][1:] for key in ("perf/mfu", "completions/mean_length")}
    return point | {
        "parameters": model.num_parameters(),
        "seconds_per_step": round(statistics.median(totals), 4),
        "phases": {name: round(statistics.median(step.get(name, 0.0) for step in timed), 4) for name in names},
        "completion_tokens": round(statistics.mean(metric["completions/mean_length"]), 1),
        "memory_gb": round(memory_gb(), 3),
        "memory_gb_before": round(before, 3),
        **({"mfu": round(statistics.median(metric["perf/mfu"]), 4)} if metric["perf/mfu"] else {}),
    }


def exponent(points: list[dict[str, Any]], size: str) -> float:
    xs = [math.log(point[size]) for point in points]
    ys = [math.log(point["seconds_per_step"]) for point in points]
    return round(statistics.linear_regression(xs, ys).slope, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a point")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--trace", type=Path, help="write a profiler trace of the first point, and nothing else")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.trace or arguments.point:
        point = BASE | (json.loads(arguments.point) if arguments.point else {})
        print(json.dumps(measure(point, arguments)))
        return
    results = {}
    own = [sys.executable, __file__, "--model", str(arguments.model), "--steps", str(arguments.steps)]
    own += ["--bf16"] if arguments.bf16 else []
    for series in arguments.series:
        points = []
        for change in SERIES[series]:
            command = [*own, "--point", json.dumps(change)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            points.append(json.loads(run.stdout.strip().splitlines()[-1]))
            print(json.dumps(points[-1]), flush=True)
        size = "parameters" if series == "size" else series
        results[series] = {"points": points, "exponent": exponent(points, size)}
    report = {
        "timed_steps": arguments.steps,
        "env_ratio": 0.25,
        "bf16": arguments.bf16,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
