"""Models of two sizes after supervised training of equal length, on dev: which one is better for the same time?

    python recipes/sft.py --config recipes/nano/sft/config_cpu.yaml --init_from null --muon_lr 0.016 \\
        --learning_rate 1.6e-3 --bf16 false --seed 1 --max_steps 2100 --output_dir runs/small
    python recipes/sft.py ... --n_embd 192 --n_head 6 --max_steps 1290 --output_dir runs/large
    python -m benchmarks.size runs/small runs/large

Train both side by side, a core and a thread each, and choose the steps so that they end together: rates fall to 0 at
the last step, so a run that is cut off is no shorter run. What a step of the demo would cost with each is measured in
turn. Never on test.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import nano
from benchmarks.common import RESULTS, ROOT, machine, write_report
from rookworld_trl.evaluation.comparison import compare
from rookworld_trl.modeling.loading import load

OUTPUT = RESULTS / "size.json"
DEMO = "recipes/nano/grpo/config_cpu_exact.yaml"
STEPS, WARM = 12, 2  # of the demo, by model and round; the first ones find their memory


def trained(folder: Path) -> dict[str, Any]:
    """Size of a run's model, and its loss over minutes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    training = json.loads((folder / "training.json").read_text())
    minutes = rows[-1]["seconds"] / 60 * training["steps"] / rows[-1]["step"]  # the last steps have no row
    model, _ = load(str(folder))
    config = {key: getattr(model.config, key) for key in ("n_layer", "n_embd", "n_head")}
    return {
        **config,
        "parameters": model.num_parameters(),
        "weights_mb": round((folder / "model.safetensors").stat().st_size / 1e6, 1),
        "steps": training["steps"],
        "minutes": round(minutes, 1),
        "tokens": training["tokens"],
        "loss_by_minute": [[round(row["seconds"] / 60, 1), round(row["loss"], 4)] for row in rows],
    }


def demo_seconds(folder: Path) -> float:
    """Median seconds of the demo's steps with the model of a folder, both cores its own; nothing is evaluated."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "recipes/grpo.py", "--config", DEMO, "--model", str(folder.resolve()), "--quiet"]
        words += ["--max_steps", str(STEPS), "--output_dir", scratch, "--eval_split", "dev"]
        words += ["--eval_policy_items", "1", "--eval_environment_items", "1"]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(scratch, "metrics.jsonl").read_text().splitlines()]
    ends = [row["seconds"] for row in rows]
    return statistics.median(end - start for start, end in zip(ends[WARM:], ends[WARM + 1 :], strict=False))


def table(report: dict[str, Any]) -> str:
    names = ["legality", "skill", "five candidates", "exactness"]
    lines = [
        "| model | parameters | minutes | steps | " + " | ".join(names) + " |",
        "|---|---:|---:|---:|" + "---|" * 4,
    ]
    for run in report["runs"].values():
        row = [f"{run['n_layer']} x {run['n_embd']}", f"{run['parameters']:,}", run["minutes"], f"{run['steps']:,}"]
        for task, metric in nano.SHOWN:
            value, low, high = run[f"{task}, greedy"][metric]
            row.append(f"{value:.3f} [{low:.3f}, {high:.3f}]")
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="RUN", help="output_dir of recipes/sft.py")
    parser.add_argument("--rounds", type=int, default=3, help="of the demo's steps, both models in turn; 0: none")
    arguments = parser.parse_args()
    runs, evaluations = [], []
    for folder in arguments.folders:
        evaluation = nano.evaluated(*load(str(folder)))
        run = trained(folder)
        for task, mode in evaluation.tasks_and_modes():
            estimates = evaluation.estimates(task, mode)
            run[f"{task}, {mode}"] = {
                metric: [round(estimates[metric][key], 4) for key in ("value", "ci_low", "ci_high")]  # type: ignore[literal-required]
                for of, metric in nano.SHOWN
                if of == task
            }
        runs.append(run)
        evaluations.append(evaluation)
    differences = compare(*evaluations, only={metric for _, metric in nano.SHOWN})
    report: dict[str, Any] = {"split": "dev", **machine("cpu")}
    report["runs"] = dict(zip(("small", "large"), runs, strict=True))
    report["large_minus_small"] = differences
    if arguments.rounds:
        rounds = [[demo_seconds(folder) for folder in arguments.folders] for _ in range(arguments.rounds)]
        report["demo_seconds_a_step"] = rounds
        report["demo_ratio"] = round(statistics.median(large / small for small, large in rounds), 2)
    write_report(OUTPUT, report)
    print(table(report))
    for row in differences:
        interval = f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        print(f"{row['task']} {row['mode']} {row['metric']}: {row['difference']:+.3f} {interval}")


if __name__ == "__main__":
    main()
