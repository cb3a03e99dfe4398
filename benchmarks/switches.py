"""What does each switch cost or save? A step with compiling, bf16, checkpointing and shared prefixes on and off.

    python -m benchmarks.switches [--model nano|124m|FOLDER] [--prompts 8] [--samples 8] [--tokens 80] [--steps 3]
    python -m benchmarks.switches --only none bf16 "share_prefixes + bf16"
    python -m benchmarks.switches --table                 # what is there so far, as a table

Each of the twelve combinations (activation checkpointing and shared prefixes exclude each other) trains in a process of
its own, so that its peak memory is its own: a first step that warms up, compiles and runs the gates, then `--steps`
timed ones. Compiled is what `accelerate_configs/rtx4090.yaml` says. The report is written after each combination; what
it holds already is not measured again, so the program may be interrupted, and run until nothing is left. On a CPU with
OMP_NUM_THREADS=1 a step's seconds are the process's own, in which others on the machine hardly count; the first step's,
in which other processes compile, are the wall's.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import RESULTS, ROOT, best_device, busy, machine, own_clock, timed_training, write_report
from benchmarks.fresh import write_fresh
from rookworld_trl.modeling.loading import load

OUTPUT = RESULTS / "switches.json"
SWITCHES = ("share_prefixes", "activation_checkpointing", "torch_compile", "bf16")
SHOWN = ("seconds_per_step", "memory_gb", "phases", "mfu")


def combinations() -> dict[str, dict[str, bool]]:
    """Settings by name; the switches that are on, joined."""
    found = {}
    for values in itertools.product((True, False), (False, True), (False, True), (False, True)):
        settings = dict(zip(SWITCHES, values, strict=True))
        if not (settings["share_prefixes"] and settings["activation_checkpointing"]):
            found[" + ".join(name for name, on in settings.items() if on) or "none"] = settings
    return found


def as_launched(file: str = "rtx4090") -> dict[str, str]:
    """How `accelerate launch` hands on its file's `dynamo_config`."""
    settings = yaml.safe_load((ROOT / f"accelerate_configs/{file}.yaml").read_text())["dynamo_config"]
    return {f"ACCELERATE_{name.upper()}": str(value) for name, value in settings.items()}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of one combination's timed steps."""
    model, tokenizer = load(arguments.model)
    device = best_device()
    clock = own_clock(device)
    sizes = {size: getattr(arguments, size) for size in ("prompts", "samples", "tokens", "steps", "micro_batch")}
    found = timed_training(model.to(device), tokenizer, device=device, clock=clock, **sizes, **combinations()[name])
    log = found.pop("log")
    first = {key: log[0][key] for key in ("step_time", "loss", "grad_norm")}
    graphs = {"graphs": log[-1]["perf/compiled_graphs"]} if "perf/compiled_graphs" in log[-1] else {}
    return {key: found[key] for key in SHOWN if key in found} | {"first_step": first} | graphs


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row of each combination; `speed` is a multiple of that with everything off, once that is there."""
    lines = [f"| {' | '.join(SWITCHES)} | s a step | speed | first step, s | GB | graphs |"]
    lines.append(f"|{'---|' * 4}{'---:|' * 5}")
    plain = results.get("none", {}).get("seconds_per_step")
    for name, settings in combinations().items():
        if name in results:
            row = results[name]
            cells = ["on" if settings[switch] else "" for switch in SWITCHES]
            speed = f"{plain / row['seconds_per_step']:.2f}" if plain else ""
            cells += [f"{row['seconds_per_step']:.3g}", speed, f"{row['first_step']['step_time']:.3g}"]
            cells += [f"{row['memory_gb']:.2f}", f"{row['graphs']:.0f}" if "graphs" in row else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="124m: GPT-2 small with random weights")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a combination")
    parser.add_argument("--micro_batch", type=int, default=32, help="rows of a forward and backward pass")
    parser.add_argument("--only", nargs="+", choices=combinations(), default=list(combinations()), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="show the report and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.table:
        print(table(report.get("results", {})))
        return
    sizes = {name: getattr(arguments, name) for name in ("prompts", "samples", "tokens", "steps", "micro_batch")}
    conditions = {"model": arguments.model, **sizes, **machine(best_device())}
    conditions["clock"] = own_clock(best_device()).__name__
    same = all(report.get(name) == value for name, value in conditions.items())
    report = {**conditions, "results": report["results"] if same else {}}
    with ExitStack() as stack:
        model = arguments.model
        for name, settings in combinations().items():
            if name in report["results"] or name not in arguments.only:
                continue
            if model == "124m":
                model = stack.enter_context(tempfile.TemporaryDirectory())
                write_fresh(Path(model))
            words = [word for size, value in sizes.items() for word in (f"--{size}", str(value))]
            command = [sys.executable, "-m", "benchmarks.switches", "--model", model, *words, "--one", name]
            environment = {**os.environ, **(as_launched() if settings["torch_compile"] else {})}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            report["results"][name] = json.loads(done.stdout.strip().splitlines()[-1]) | {"busy_processes": busy()}
            write_report(arguments.output, report)
            print(f"{name}: {report['results'][name]['seconds_per_step']} s a step", flush=True)
    print(table(report["results"]))


if __name__ == "__main__":
    main()
