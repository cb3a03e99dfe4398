"""A whole GRPO run of one step on 124,439,808 random parameters, through the recipe: gates, memory, seconds.

    python -m benchmarks.step_124m [--prompts 2] [--generations 4] [--completion 24] [--output FILE]

On the CPU by default sizes (2 prompts x 4 generations, short); on a GPU take 8 x 8 and 144 tokens to compare with the
4.8 GB that earlier implementations took for it. Fails when a gate does.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, write_report
from benchmarks.fresh import write_fresh
from recipes import grpo
from rookworld_trl.reports.summary import versions
from rookworld_trl.training.gates import Bounds

OUTPUT = RESULTS / "step_124m.json"
PARAMETERS = 124_439_808
SHOWN = ("kl", "loss", "grad_norm", "reward", "perf/memory_gb", "perf/tflops_per_second", "rollout/seconds_per_sample")


def one_step(folder: Path, prompts: int, generations: int, completion: int, gpu: bool) -> dict[str, float]:
    """Train one step and return its line of `metrics.jsonl`."""
    model = write_fresh(folder / "model")
    assert model.num_parameters() == PARAMETERS
    settings = {
        "model": folder / "model",
        "output_dir": folder / "run",
        "mix_env_ratio": 0.5,
        "num_generations": generations,
        "per_device_train_batch_size": prompts * generations,
        "max_completion_length": completion,
        "max_steps": 1,
        "eval_policy_items": 2,
        "eval_environment_items": 2,
        "save_strategy": "no",
        "report_to": "none",
        "target_rows": 2,
        "use_cpu": not gpu,
        "bf16": gpu,
        "seed": 1,
    }
    grpo.main([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return next(row for row in map(json.loads, lines) if "kl" in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2, help="half of them A:")
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--completion", type=int, default=24, help="tokens at most")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        step = one_step(Path(folder), arguments.prompts, arguments.generations, arguments.completion, gpu)
    seconds = time.perf_counter() - started
    bounds = Bounds.for_precision(mixed=gpu)
    limits = {"padding": bounds.logp, "reference": bounds.kl, "sampled_ids": 0.0, "sampler": bounds.logp}
    gates = {name: step[f"gates/{name}"] for name in limits}
    print(f"\n{PARAMETERS:,} parameters, {arguments.prompts} prompts x {arguments.generations}, {seconds:.0f} s in all")
    for name, limit in limits.items():
        print(f"gate {name:<12} {gates[name]:.1e}, limit {limit:.0e}{'' if gates[name] <= limit else '  <-- FAILS'}")
    for name in SHOWN:
        if name in step:
            print(f"{name:<30} {step[name]:.4g}")
    report = {
        "parameters": PARAMETERS,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "sizes": {name: getattr(arguments, name) for name in ("prompts", "generations", "completion")},
        "gates": gates,
        "step": {name: step[name] for name in SHOWN if name in step},
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    write_report(arguments.output, report)
    return 0 if all(gates[name] <= limit for name, limit in limits.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
