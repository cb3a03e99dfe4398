"""Two changes to how rookworld-nano starts, each beside what there is: from scratch, at equal steps, on dev.

    python -m benchmarks.nano3_trials train --positions data/positions --output runs/nano3-trials
    python -m benchmarks.nano3_trials compare --output runs/nano3-trials
    python -m benchmarks.nano3_trials table

`side_first` has a token of the side to move before the squares of each FEN; `mirror` shows each position with the
colours exchanged, too. `train` makes what is missing, one trial after the other, in one process and thread each, so
that CPU time counts all the work; give the same command again where it was interrupted. Never on test.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import nano
from benchmarks.common import RESULTS, ROOT, machine, shipped, write_report
from benchmarks.evidence.rivals import encode, likelihood
from rookworld_trl.chess.accuracy import Evaluation, evaluate
from rookworld_trl.chess.splits import draw_of_each
from rookworld_trl.files import write_atomically
from rookworld_trl.measuring.comparison import compare, compare_groups
from rookworld_trl.modeling.loading import load

OUTPUT = RESULTS / "nano3_trials.json"
TRIALS: dict[str, list[str]] = {
    "base": [],
    "side_first": ["--tokenizer", "nano_side_first"],
    "mirror": ["--mirror", "true"],
}
# The rate stays for three quarters of the steps, so that a longer training can go on from what stands before it falls.
DECAY = 0.25
BATCH = 50  # rows of a forward pass
METRICS = {metric for _, metric in nano.SHOWN}


def settings(steps: int) -> list[str]:
    """Of every trial, beside the recipe's own: from scratch, at the rates with which it is begun."""
    decay = round(steps * DECAY)
    words = ["--config", "recipes/nano/sft/config_cpu.yaml", "--init_from", "null", "--seed", "1"]
    words += ["--muon_lr", "0.016", "--learning_rate", "1.6e-3", "--max_steps", str(steps)]
    words += ["--lr_scheduler_type", "warmup_stable_decay"]
    words += ["--lr_scheduler_kwargs", json.dumps({"num_decay_steps": decay})]
    # One process, whose CPU time is all there is; the checkpoint before the rate falls is kept.
    return [*words, "--dataloader_num_workers", "0", "--save_steps", str(decay), "--save_total_limit", "2"]


def train(positions: Path, output: Path, steps: int, names: Sequence[str]) -> None:
    """The trials that have no result yet, and beside each the CPU seconds that it took, start included."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for name in names:
        folder = output / name
        clock = folder / "cpu_seconds.json"
        done = json.loads(clock.read_text()) if clock.exists() else []
        if (folder / "training.json").exists() and done:
            continue
        words = [sys.executable, "recipes/sft.py", *settings(steps), *TRIALS[name], "--quiet"]
        words += ["--positions", str(positions.resolve()), "--output_dir", str(folder.resolve())]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = subprocess.run(words, cwd=ROOT, env=environment).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(clock, json.dumps([*done, round(seconds, 1)]) + "\n")
        if code:
            raise SystemExit(f"trial {name} ended with exit code {code}; see {folder}, then give the command again")


def nats_an_answer(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the right answers cost, in nats an answer (a token would not do: a mark more makes tokens cheaper)."""
    found = {}
    for task in sorted({row["task"] for row in rows}):
        chosen = sorted((row for row in rows if row["task"] == task), key=lambda row: len(row["prompt"]))
        nats = 0.0
        for start in range(0, len(chosen), BATCH):
            prompts, answers = encode(tokenizer, chosen[start : start + BATCH])
            with torch.no_grad():
                nats += float(likelihood(model, tokenizer.pad_token_id, prompts, answers)) * sum(map(len, answers))
        found[task] = round(nats / len(chosen), 4)
    return found


def measured(folder: Path) -> tuple[dict[str, Any], Evaluation]:
    """A trial's cost, losses and metrics, of all and by who is to move, and the items they are made of; made once."""
    of_all, of_items = folder / "measured.json", folder / "evaluation.json"
    if of_all.exists():
        return json.loads(of_all.read_text()), Evaluation.from_dict(json.loads(of_items.read_text()))
    model, tokenizer = load(str(folder))
    rows = list(draw_of_each(shipped("dev"), nano.ITEMS))
    training = json.loads((folder / "training.json").read_text())
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(json.loads((folder / "cpu_seconds.json").read_text()))
    found: dict[str, Any] = {"parameters": model.num_parameters(), "steps": training["steps"]}
    found |= {"tokens": training["tokens"], "cpu_minutes": round(seconds / 60, 2)}
    found["loss"] = {row["step"]: round(row["loss"], 4) for row in logged if "loss" in row}
    found["nats"] = nats_an_answer(model.eval(), tokenizer, rows)
    options: dict[str, Any] = {"modes": ("greedy",), "max_new_tokens": 80, "batch_size": 128}
    evaluation = evaluate(model, tokenizer, rows, **options)
    for task, mode in evaluation.tasks_and_modes():
        for name, having in {"all": {}, "white": {"color": "white"}, "black": {"color": "black"}}.items():
            estimates = evaluation.estimates(task, mode, **having)
            found[f"{task}, {mode}, {name}"] = {
                metric: nano.rounded(estimates[metric]) for of, metric in nano.SHOWN if of == task
            }
    evaluation.write(of_items)
    write_report(of_all, found)
    return found, evaluation


def against(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Paired differences, over all items and by who is to move."""
    rows = [{"group": "all", **row} for row in compare(before, after, only=METRICS)]
    rows += [row for row in compare_groups(before, after) if row["group"].startswith("color")]
    kept = ("group", "task", "metric", "before", "after", "difference", "ci_low", "ci_high", "items", "significant")
    return [
        {name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in kept}
        for row in rows
        if row["metric"] in METRICS
    ]


def table(report: dict[str, Any]) -> str:
    """Trials as rows, then every difference."""
    names = ["legality", "skill", "White's", "Black's", "five candidates", "exactness"]
    cells = [("policy", "all", "best_legal"), ("policy", "all", "skill"), ("policy", "white", "skill")]
    cells += [("policy", "black", "skill"), ("policy", "all", "candidates_legal_distinct")]
    cells += [("environment", "all", "exact")]
    lines = ["| trial | steps | CPU minutes | nats `P:` | nats `A:` | " + " | ".join(names) + " |"]
    lines.append("|---|---:|---:|---:|---:|" + "---|" * len(names))
    for name, run in report["trials"].items():
        row = [name, f"{run['steps']:,}", run["cpu_minutes"], run["nats"]["policy"], run["nats"]["environment"]]
        for task, side, metric in cells:
            value, low, high = run[f"{task}, greedy, {side}"][metric]
            row.append(f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]")
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", "| less base, paired | of | metric | difference |", "|---|---|---|---|"]
    for name, rows in report["less_base"].items():
        for row in rows:
            interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
            bold = "**" if row["significant"] else ""
            value = f"{bold}{row['difference']:+.3f}{bold}{interval}"
            lines.append(f"| {name} | {row['group'].removeprefix('color=')} | {row['metric']} | {value} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "compare", "table"))
    parser.add_argument("--positions", type=Path, default=Path("data/positions"))
    parser.add_argument("--output", type=Path, default=Path("runs/nano3-trials"), help="a folder a trial goes here")
    parser.add_argument("--report", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        train(arguments.positions, arguments.output, arguments.steps, arguments.trials)
        return
    if arguments.command == "compare":
        done = [name for name in arguments.trials if (arguments.output / name / "cpu_seconds.json").exists()]
        found = {name: measured(arguments.output / name) for name in done}
        report: dict[str, Any] = {"split": "dev", "seed": 1, **machine("cpu")}
        report["trials"] = {name: run for name, (run, _) in found.items()}
        base = found["base"][1]
        report["less_base"] = {name: against(base, each) for name, (_, each) in found.items() if name != "base"}
        write_report(arguments.report, report)
    print(table(json.loads(arguments.report.read_text())))


if __name__ == "__main__":
    main()
