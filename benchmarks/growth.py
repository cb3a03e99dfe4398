"""Where does a step's time go, and how do time and memory grow with batch, group, length and model?

    python -m benchmarks.growth [--steps 3] [--model PATH] [--bf16]
    python -m benchmarks.growth --trace trace.json     # one profiled step of the first point, for chrome://tracing

Each point is a training run of its own in a process of its own (so that its peak memory is its own): a first step that
warms up and runs the gates, then `--steps` timed ones, mixed tasks, one update a batch. Prompts a batch and samples a
prompt vary with the shipped model; completion length and model size with random weights, which hardly ever end a
completion and so write exactly the length asked for. A phase's seconds are its own, without those of phases inside it.
`exponent` is the slope of log seconds against log size, least squares: 1 is linear growth.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import RESULTS, ROOT, best_device, machine, timed_training, write_report
from rookworld_trl.modeling.loading import NANO_FOLDER, load
from rookworld_trl.training.memory import memory_gb

OUTPUT = RESULTS / "growth.json"
BASE = {"prompts": 8, "samples": 16, "tokens": 100, "size": None}
SERIES: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompts": value} for value in (4, 8, 16, 32)],
    "samples": [{"samples": value} for value in (8, 16, 32, 64)],
    "tokens": [{"tokens": value, "size": (4, 128)} for value in (20, 40, 80)],
    "size": [{"tokens": 40, "size": value} for value in ((4, 128), (8, 256), (12, 512))],
}


def random_gpt2(like: GPT2Config, layers: int, width: int) -> GPT2LMHeadModel:
    config = GPT2Config(**like.to_dict() | {"n_layer": layers, "n_embd": width, "n_head": width // 32})
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def measure(point: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of one point's timed steps."""
    model, tokenizer = load(arguments.model)
    if point["size"]:
        model = random_gpt2(model.config, *point["size"])
    before = memory_gb()
    profiler = torch.profiler.profile(record_shapes=True) if arguments.trace else None
    sizes = {name: point[name] for name in ("prompts", "samples", "tokens")}
    found = timed_training(
        model, tokenizer, **sizes, device=best_device(), steps=arguments.steps, profiler=profiler, bf16=arguments.bf16
    )
    if profiler is not None:
        profiler.export_chrome_trace(str(arguments.trace))
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    del found["log"]
    return point | found | {"memory_gb_before": round(before, 3)}


def exponent(points: list[dict[str, Any]], size: str) -> float:
    xs = [math.log(point[size]) for point in points]
    ys = [math.log(point["seconds_per_step"]) for point in points]
    return round(statistics.linear_regression(xs, ys).slope, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO_FOLDER)
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
    own = [sys.executable, "-m", "benchmarks.growth", "--model", str(arguments.model), "--steps", str(arguments.steps)]
    own += ["--bf16"] if arguments.bf16 else []
    for series in arguments.series:
        points = []
        for change in SERIES[series]:
            command = [*own, "--point", json.dumps(change)]
            run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            points.append(json.loads(run.stdout.strip().splitlines()[-1]))
            print(json.dumps(points[-1]), flush=True)
        size = "parameters" if series == "size" else series
        results[series] = {"points": points, "exponent": exponent(points, size)}
    report = {
        "timed_steps": arguments.steps,
        "env_ratio": 0.25,
        "bf16": arguments.bf16,
        **machine(best_device()),
        "results": results,
    }
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
