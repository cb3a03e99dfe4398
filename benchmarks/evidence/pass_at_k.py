"""pass@k: does training teach what the start could not do, or only make likelier what it did now and then?

    python -m benchmarks.evidence.pass_at_k --models base=nano exact=runs/evidence/test-exact-3min-seed1 [...]

Each model answers each prompt 16 times at temperature 1 (nothing is cut off, so that k samples show what is there);
pass@k is the chance that one of k of these is right, by the unbiased estimator of Chen et al. 2021
(arXiv 2107.03374), 1 - C(n - c, k) / C(n, k) with c right ones of n. Intervals are of the difference from the first
model on the same prompts, over games. How many of the answers to each prompt were right is kept in
`benchmarks/results/evidence/pass_at_k.json`, and a NAME without a path takes them from there.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from benchmarks.common import machine, shipped, write_report
from benchmarks.evidence import store
from benchmarks.evidence.statistics import draws
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.evaluation import evaluate
from rookworld_trl.evaluation.intervals import percentile_interval
from rookworld_trl.modeling.loading import load

REPORT = store.FOLDER / "pass_at_k.json"
SAMPLES, TOKENS, TEMPERATURE = 16, 80, 1.0
KS = (1, 2, 4, 8, 16)
# What counts as right: `B:` is legal; it is the engine's best move; it is in its top five; the answer is exact.
RIGHT = {"policy": ("best_legal", "top1", "best_in_top5"), "environment": ("exact",)}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of these samples, drawn without replacement, hold a right one."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def count(model: Any, tokenizer: Any, split: str, items: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """By metric: `games` of the prompts, and how many of the `SAMPLES` answers to each are right."""
    rows = list(draw_of_each(shipped(split), dict(items)))
    counts: dict[str, dict[str, Any]] = {}
    for seed in range(1, SAMPLES + 1):
        found = evaluate(
            model,
            tokenizer,
            rows,
            modes=("sampled",),
            temperature=TEMPERATURE,
            max_new_tokens=TOKENS,
            batch_size=128,
            seed=seed,
        )
        for task, metrics in RIGHT.items():
            own = found.select(task, "sampled")  # type: ignore[arg-type]
            for metric in metrics:
                right = np.asarray([int(item.scores[metric] == 1.0) for item in own])
                entry = counts.setdefault(metric, {"games": [item.game for item in own], "right": 0 * right})
                entry["right"] = entry["right"] + right
    return {metric: {**entry, "right": entry["right"].tolist()} for metric, entry in counts.items()}


def stored(name: str, split: str, items: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What `count` returned for the model of that name when the report was written.

    Raises:
        SystemExit: the report holds no such model, or other prompts.
    """
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    same = [report.get(key) for key in ("samples", "split", "items")] == [SAMPLES, split, dict(items)]
    if not same or name not in report["right"]:
        raise SystemExit(f"{REPORT} holds no {name} on these prompts of {split}; give {name}=PATH")
    rows = list(draw_of_each(shipped(split), dict(items)))
    games = {task: [row["game"] or "" for row in rows if row["task"] == task] for task in RIGHT}
    task_of = {metric: task for task, metrics in RIGHT.items() for metric in metrics}
    right = report["right"][name].items()
    return {metric: {"games": games[task_of[metric]], "right": counts} for metric, counts in right}


def random_legal(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """pass@k, for each of `KS`, of whoever draws legal moves at random, with replacement; of the `P:` rows."""
    shares: dict[str, list[float]] = {"best_legal": [], "top1": [], "best_in_top5": []}
    for row in rows:
        if values := sorted(row["legal_cp"] or (), reverse=True):
            shares["best_legal"].append(1.0)
            for metric, place in (("top1", 0), ("best_in_top5", min(5, len(values)) - 1)):
                shares[metric].append(sum(value >= values[place] for value in values) / len(values))
    return {metric: [float(np.mean(1 - (1 - np.asarray(of)) ** k)) for k in KS] for metric, of in shares.items()}


def compare(counts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """pass@k of each model and its difference from the first one's, by metric and k."""
    names, rows = list(counts), []
    for metric in counts[names[0]]:
        games: Sequence[str] = counts[names[0]][metric]["games"]
        sides = []
        for name in names:
            values = np.asarray([[pass_at_k(SAMPLES, c, k) for k in KS] for c in counts[name][metric]["right"]])
            sides.append([(values, np.ones_like(values))])
        drawn = draws(sides, games)
        for i, name in enumerate(names):
            for j, k in enumerate(KS):
                row = {"model": name, "metric": metric, "k": k, "value": float(sides[i][0][0][:, j].mean())}
                if i:
                    difference = drawn[:, i, j] - drawn[:, 0, j]
                    low, high = percentile_interval(difference)
                    row |= {"difference": row["value"] - float(sides[0][0][0][:, j].mean())}
                    row |= {"ci_low": low, "ci_high": high}
                rows.append(row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| right | model | " + " | ".join(f"pass@{k}" for k in KS) + " |", "|---|---|" + "---|" * len(KS)]
    for metric, name in dict.fromkeys((row["metric"], row["model"]) for row in rows):
        cells = []
        for row in rows:
            if (row["metric"], row["model"]) == (metric, name):
                cell = f"{row['value']:.3f}"
                if "difference" in row:
                    cell += f" ({row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}])"
                cells.append(cell)
        lines.append(f"| {metric} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME[=PATH]", help="the first is the start")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--policy-items", type=int, default=500)
    parser.add_argument("--environment-items", type=int, default=252)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    items = {"policy": arguments.policy_items, "environment": arguments.environment_items}
    counts = {}
    for name, _, path in (each.partition("=") for each in arguments.models):
        if path:
            counts[name] = count(*load(path), arguments.split, items)
            print(f"sampled {name}", flush=True)
        else:
            counts[name] = stored(name, arguments.split, items)
    rows = compare(counts)
    report = {"split": arguments.split, "samples": SAMPLES, "temperature": TEMPERATURE, "items": items}
    report["random legal"] = random_legal(draw_of_each(shipped(arguments.split), items))
    report |= {"rows": rows, "right": {name: {m: e["right"] for m, e in of.items()} for name, of in counts.items()}}
    write_report(REPORT, report | machine("cpu"))
    print(as_markdown(rows))
    for metric, of_k in report["random legal"].items():
        print(f"random legal: {metric} {' '.join(f'{value:.3f}' for value in of_k)}")


if __name__ == "__main__":
    main()
