"""How far rookworld-nano has come: checkpoints of its supervised training on dev, by stratum, and how their lists look.

    python -m benchmarks.nano "shipped=rookworld_trl/assets/nano" [NAME=FOLDER ...]
    python -m benchmarks.nano --table

Never on test. The report is written after each checkpoint; a name that it holds is not measured again.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, shipped, write_report
from rookworld_trl.chess import ParseError, policy
from rookworld_trl.chess.accuracy import evaluate
from rookworld_trl.chess.dataset import draw_of_each
from rookworld_trl.measuring import Result
from rookworld_trl.measuring.metrics import Estimate
from rookworld_trl.modeling.loading import load

OUTPUT = RESULTS / "nano.json"
ITEMS = {"policy": 1_500, "environment": None}
OF_STRATA = {"policy": "best_legal", "environment": "exact"}
SHOWN = (("policy", "best_legal"), ("policy", "skill"), ("policy", "candidates_legal_distinct"))
SHOWN += (("environment", "exact"),)


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the lowest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; 0 where one side is constant."""
    first, second = ranks(np.array(x)), ranks(np.array(y))
    return float(np.corrcoef(first, second)[0, 1]) if first.std() and second.std() else 0.0


def lists(result: Result, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the greedy or sampled lists look like: order, evals against the engine's, which candidate is `B:`."""
    values = {row["prompt"]: dict(zip(row["legal_moves"], row["legal_cp"], strict=True)) for row in rows}
    within, written, right, equal, alphabetical, first = [], [], [], [], [], []
    for item in result.items:
        try:
            answer = policy.parse(item.completion)
        except ParseError:
            continue
        alphabetical.append(list(answer.moves) == sorted(answer.moves))
        first.append(answer.best == answer.moves[0])
        if len(answer.evals) > 1:
            equal.append(len(set(answer.evals)) == 1)
        of = values[item.prompt]
        pairs = [(eval, of[move]) for move, eval in zip(answer.moves, answer.evals, strict=False) if move in of]
        written += [pair[0] for pair in pairs]
        right += [pair[1] for pair in pairs]
        if len({cp for _, cp in pairs}) > 1 and len(pairs) > 2:
            within.append(correlation(*map(list, zip(*pairs, strict=True))))
    named = {"evals_correlate_within_a_list": within, "all_evals_equal": equal, "alphabetical": alphabetical}
    found = {name: round(fmean(each), 4) for name, each in (named | {"best_is_first": first}).items() if each}
    return found | {"evals_correlate_over_all_moves": round(correlation(written, right), 4)}


def evaluated(model: Any, tokenizer: Any) -> list[Result]:
    """Greedy and sampled answers to the items that every checkpoint is measured on."""
    settings = {"temperature": 0.7, "max_new_tokens": 80, "batch_size": 128, "seed": 1}
    return evaluate(model, tokenizer, list(draw_of_each(shipped("dev"), ITEMS)), **settings)


def rounded(found: Estimate) -> list[float | None]:
    """Value and interval, whose bounds are None over too few games."""
    return [each if each is None else round(each, 4) for each in (found["value"], found["ci_low"], found["ci_high"])]


def measure(folder: str) -> dict[str, Any]:
    """Metrics with intervals, strata, lists, and what trivial players reach on the same items."""
    model, tokenizer = load(folder)
    rows = list(draw_of_each(shipped("dev"), ITEMS))
    evaluation = evaluated(model, tokenizer)
    found: dict[str, Any] = {"parameters": model.num_parameters()}
    policy_rows = [row for row in rows if row["task"] == "policy"]
    for result in evaluation:
        task, mode, estimates = result.name, result.mode, result.estimates()
        metrics = {name: rounded(each) for name, each in estimates.items() if each["value"] is not None}
        strata = {}
        for (kind, stratum), count in result.groups().items():
            if kind == "stratum":
                value = result.estimates(stratum=stratum)[OF_STRATA[task]]["value"]
                strata[stratum] = [count, round(value or 0.0, 4)]
        found[f"{task}, {mode}"] = {"metrics": metrics, "strata": strata}
        found[f"{task}, {mode}"] |= {"trivial_players": result.baselines()} if mode == "greedy" else {}
        found[f"{task}, {mode}"] |= {"lists": lists(result, policy_rows)} if task == "policy" else {}
    return found


def table(report: dict[str, Any]) -> str:
    lines = ["| checkpoint | " + " | ".join(name for _, name in SHOWN) + " |", "|---|" + "---:|" * len(SHOWN)]
    for name, of in report["checkpoints"].items():
        cells = []
        for task, metric in SHOWN:
            value, low, high = of[f"{task}, greedy"]["metrics"][metric]
            cells.append(f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report = {"split": "dev", "temperature": 0.7, **machine("cpu"), "checkpoints": {}, **report}
    for pair in arguments.checkpoints:
        name, _, folder = pair.partition("=")
        if name not in report["checkpoints"]:
            report["checkpoints"][name] = measure(folder)
            write_report(arguments.output, report)
    print(table(report))


if __name__ == "__main__":
    main()
