"""Start or RL? Checkpoints of one supervised training, each with RL of equal time: metrics after by the loss before.

    python -m benchmarks.evidence.starts run --starts 1040=FOLDER 3176=FOLDER 8176=FOLDER 12776=FOLDER
    python -m benchmarks.evidence.starts table
    python -m benchmarks.evidence.starts predict --model FOLDER
    python -m benchmarks.evidence.starts reach

A start is named by its supervised steps. `run` measures each start's loss on the right answers and its metrics, trains
it with the exact gradient and measures it again, all on dev; what has a result is not made again. `table` fits a line
to each headline after RL by the loss before, and says whether it holds: the slope's interval must not contain 0, and
the line through the other starts must meet each start within its interval. `predict` reads off the lines that
hold what the same RL would make of another checkpoint of this training. `reach` says how many supervised steps the
curve before RL would take to what a start should show.
"""

import argparse
import json
import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, shipped, write_report
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import store
from benchmarks.evidence.rivals import encode, likelihood
from benchmarks.evidence.statistics import draws
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.evaluation.intervals import Array
from rookworld_trl.modeling.loading import load

ARM, SPLIT = "exact", "dev"
BATCH = 50  # rows of a forward pass
LABELS = {  # of the headlines, and whose loss each is compared with
    "best_legal": ("legality", "policy", "`P:` rows"),
    "skill": ("skill", "policy", "`P:` rows"),
    "exact": ("exactness", "environment", "`A:` rows"),
}

# Of a start, greedy.
AIMS = {"best_legal": 0.98, "skill": 0.30, "candidates_legal_distinct": 0.90, "exact": 0.93}


def losses(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Cross-entropy of the right answers, end tokens included, in nats a token: of each task's rows, and of all."""
    nats: dict[str, float] = {}
    counts: dict[str, int] = {}
    for task in sorted({row["task"] for row in rows}):
        chosen = sorted((row for row in rows if row["task"] == task), key=lambda row: len(row["prompt"]))
        for start in range(0, len(chosen), BATCH):
            prompts, answers = encode(tokenizer, chosen[start : start + BATCH])
            tokens = sum(map(len, answers))
            with torch.no_grad():
                mean = float(likelihood(model, tokenizer.pad_token_id, prompts, answers))
            for name in (task, "all"):
                nats[name] = nats.get(name, 0.0) + mean * tokens
                counts[name] = counts.get(name, 0) + tokens
    return {name: nats[name] / counts[name] for name in nats}


def run(arguments: argparse.Namespace) -> None:
    path = store.FOLDER / "starts" / "losses.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    limits = {"policy": arguments.policy_items, "environment": arguments.environment_items}
    for name, folder in arguments.starts.items():
        model, tokenizer = load(folder)
        weights = evidence.weights_of(folder)
        if known.get(name, {"weights": weights})["weights"] != weights:
            raise SystemExit(f"{path}: start {name} has other weights than {folder}; remove its results or rename it")
        if name not in known:
            rows = list(draw_of_each(shipped(SPLIT), limits))
            known[name] = {"steps": int(name), "weights": weights, **losses(model.eval(), tokenizer, rows)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_report(path, known)
    for seed in arguments.seeds:  # every start's first seed before any second
        for name, folder in arguments.starts.items():
            asked = {"arms": [ARM], "minutes": [arguments.minutes], "seeds": [seed], "split": SPLIT}
            asked |= {"size": "nano", "device": None, "start": folder, "start_name": name, "updates": None}
            asked |= {f"{task}_items": number for task, number in limits.items()}
            evidence.run(argparse.Namespace(**asked))


def slopes(x: Array, y: Array) -> tuple[Array, Array]:
    """Least-squares slope and intercept of each row of y (draws, starts) on x (starts)."""
    slope = (y - y.mean(axis=1, keepdims=True)) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return slope, y.mean(axis=1) - slope * x.mean()


def fit(x: Array, drawn: Array) -> dict[str, Any]:
    """A line through the starts' metrics after RL, and whether it holds.

    Args:
        x: loss of each start.
        drawn: (draws, starts), the metric after RL.

    Returns:
        The slope with its interval; by start, what it has above the line through the others (with intervals); `holds`.
    """
    slope, _ = slopes(x, drawn)
    above: list[dict[str, float]] = []
    for left_out in range(len(x) if len(x) > 2 else 0):  # a line through two points says nothing about them
        rest = [i for i in range(len(x)) if i != left_out]
        a, b = slopes(x[rest], drawn[:, rest])
        error = drawn[:, left_out] - (a * x[left_out] + b)
        above.append({"mean": float(error.mean()), **evidence.interval(error)})
    line = {"slope": float(slope.mean()), **evidence.interval(slope)}
    sloped = not line["ci_low"] <= 0 <= line["ci_high"]
    met = bool(above) and all(error["ci_low"] <= 0 <= error["ci_high"] for error in above)
    return {**line, "above_the_others": above, "holds": sloped and met}


def results(minutes: float) -> tuple[dict[str, Any], list[str], list[list[store.Result]]]:
    """Of all starts that have a run: losses by name, names in the order of steps, and runs, before and then after."""
    folder = store.FOLDER / "starts"
    if not (folder / "losses.json").exists():
        raise SystemExit(f"{folder} has no losses.json; `run` makes it")
    known = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    own = f"/{ARM}-{minutes:g}min-seed"
    found = {name: [store.read(SPLIT, run) for run in store.names(SPLIT, name) if own in run] for name in known}
    names = sorted((name for name in known if found[name]), key=lambda name: known[name]["steps"])
    if len(names) < 2:
        raise SystemExit(f"{folder}: no two starts have a run of {minutes:g} minutes; `run` makes them")
    runs = [[store.read(SPLIT, store.name_of(evidence.BASE, 0.0, 0, start=name))] for name in names]
    runs += [found[name] for name in names]
    if any(each.keys != runs[0][0].keys for side in runs for each in side):
        raise SystemExit(f"{folder}: results of other items among them; remove them and run again")
    return known, names, runs


def headlines(
    runs: list[list[store.Result]], chosen: Container[str] = evidence.COMPARED
) -> Iterator[tuple[str, str, str, Array]]:
    """Task, mode, name and bootstrap draws (draws, runs) of each headline, or of the metrics chosen."""
    first = runs[0][0]
    for task, mode in first.terms:
        drawn = draws([[each.terms[task, mode] for each in side] for side in runs], first.games[task])
        for column, metric in enumerate(store.metrics_of(task)):
            if metric.name in chosen:
                yield task, mode, metric.name, drawn[:, :, column]


def table(arguments: argparse.Namespace) -> None:
    """Metrics before and after by start, differences, and fits; written to `starts.json` and printed."""
    known, names, runs = results(arguments.minutes)
    first, n = runs[0][0], len(names)
    report: dict[str, Any] = {"split": SPLIT, "minutes": arguments.minutes, "trivial": first.facts["trivial"]}
    report["items"] = {task: len(keys) for task, keys in first.keys.items()}
    report |= {**machine("cpu"), "starts": [], "fits": []}
    for name, side in zip(names, runs[n:], strict=True):
        made = {"seeds": [each.facts["seed"] for each in side], "rl_steps": [each.facts["steps"] for each in side]}
        report["starts"].append(known[name] | made)
    for task, mode, metric, values in headlines(runs):
        before, after = values[:, :n], values[:, n:]
        for i in range(n):
            shown = {"before": before[:, i], "after": after[:, i], "gain": after[:, i] - before[:, i]}
            if i + 1 < n:  # what more supervised training made of the start, against what RL made of it
                shown["rl_minus_next"] = after[:, i] - before[:, i + 1]
            report["starts"][i][f"{metric}, {mode}"] = {
                what: {"mean": float(each.mean()), **evidence.interval(each)} for what, each in shown.items()
            }
        x = np.array([known[name][task] for name in names])
        for what, y in (("after", after), ("gain", after - before)):
            report["fits"].append({"metric": metric, "mode": mode, "of": what, "loss": task, **fit(x, y)})
    write_report(store.FOLDER / "starts.json", report)
    print(as_markdown(report))


def predict(arguments: argparse.Namespace) -> None:
    """What the lines say of another checkpoint: its losses, and the headlines after RL of the same time."""
    known, names, runs = results(arguments.minutes)
    items = {task: len(keys) for task, keys in runs[0][0].keys.items()}
    model, tokenizer = load(arguments.model)
    found = losses(model.eval(), tokenizer, list(draw_of_each(shipped(SPLIT), items)))  # type: ignore[arg-type]
    for task, mode, metric, values in headlines(runs):
        x = np.array([known[name][task] for name in names])
        after = values[:, len(names) :]
        if not fit(x, after)["holds"]:
            print(f"{metric}, {mode}: the loss before does not say it")
            continue
        slope, level = slopes(x, after)
        at = slope * found[task] + level
        outside = "" if x.min() <= found[task] <= x.max() else " (outside the losses that were measured)"
        value = _cell({"mean": float(at.mean()), **evidence.interval(at)})
        print(f"{metric}, {mode}: {value} at a loss of {found[task]:.4f}{outside}")


def steps_to(aim: float, steps: Array, drawn: Array) -> Array:
    """At how many steps a power law through what is missing, 1 - metric = c * steps^-b, has come to the aim.

    Args:
        steps: of each start.
        drawn: (draws, starts), the metric.

    Returns:
        One number of steps a draw; infinite where the metric does not grow.
    """
    slope, level = slopes(np.log(steps), np.log(1 - drawn))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(slope < 0, np.exp((np.log(1 - aim) - level) / slope), np.inf)


def reach(arguments: argparse.Namespace) -> None:
    """The aims' steps by the curve through all starts and by that through the last three, with 95 % intervals."""
    known, names, runs = results(arguments.minutes)
    steps = np.array([known[name]["steps"] for name in names], dtype=float)
    for _, mode, metric, values in headlines(runs, AIMS):
        if mode != "greedy":
            continue
        before = values[:, : len(names)]
        name = LABELS.get(metric, (metric,))[0]
        print(f"{name}: {before[:, -1].mean():.3f} after {steps[-1]:,.0f} steps, {AIMS[metric]} takes")
        for first in (0, len(names) - 3):
            found = steps_to(AIMS[metric], steps[first:], before[:, first:])
            middle, low, high = np.quantile(found, [0.5, 0.025, 0.975])
            print(f"    {middle:,.0f} [{low:,.0f}, {high:,.0f}] by the starts from {steps[first]:,.0f} steps on")


def _number(value: float, form: str = ".3f") -> str:
    return format(value, form).replace("-", "−")


def _cell(value: dict[str, float], form: str = ".3f", bold: bool = False) -> str:
    """Mean and interval; with `bold`, the mean is bold where the interval does not contain 0."""
    mark = "**" if bold and not value["ci_low"] <= 0 <= value["ci_high"] else ""
    bounds = f"[{_number(value['ci_low'], form)}, {_number(value['ci_high'], form)}]"
    return f"{mark}{_number(value['mean'], form)}{mark} {bounds}"


def as_markdown(report: dict[str, Any]) -> str:
    """The two tables of `docs/start-or-rl.md`, greedy."""
    lines = [
        "| metric | supervised steps | loss before | before RL | after RL | gain | RL − the next start before RL |"
    ]
    lines.append("|---|---:|---:|---|---|---|---|")
    for name, (label, task, _) in LABELS.items():
        for start in report["starts"]:
            value = start[f"{name}, greedy"]
            cells = [label, f"{start['steps']:,}", f"{start[task]:.3f}", _cell(value["before"]), _cell(value["after"])]
            cells += [_cell(value[what], "+.3f", bold=True) for what in ("gain", "rl_minus_next") if what in value]
            lines.append(f"| {' | '.join(cells)} |" + ("" if "rl_minus_next" in value else " |"))
    lines += [
        "",
        "| after RL | by the loss of | slope a nat a token | each start above the line of the others | holds |",
    ]
    lines.append("|---|---|---|---|---|")
    for line in report["fits"]:
        if (line["mode"], line["of"]) == ("greedy", "after"):
            label, _, rows = LABELS[line["metric"]]
            above = ", ".join(_number(error["mean"], "+.3f") for error in line["above_the_others"])
            slope = _cell({"mean": line["slope"], "ci_low": line["ci_low"], "ci_high": line["ci_high"]}, "+.2f")
            lines.append(f"| {label} | {rows} | {slope} | {above} | {'yes' if line['holds'] else 'no'} |")
    return "\n".join(lines)


class Named(argparse.Action):
    """STEPS=FOLDER ... as a dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        starts = {}
        for value in values:
            name, _, folder = value.partition("=")
            if not name.isdigit() or not folder or not Path(folder).is_dir():
                parser.error(f"--starts {value}: give STEPS=FOLDER, a number of steps and a folder that is there")
            starts[name] = folder
        setattr(namespace, self.dest, starts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "predict", "reach"])
    parser.add_argument("--starts", nargs="+", action=Named, default={}, metavar="STEPS=FOLDER")
    parser.add_argument("--minutes", type=float, default=3.0, help="CPU minutes of RL")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--policy-items", type=int, default=600)
    parser.add_argument("--environment-items", type=int, default=400)
    parser.add_argument("--model", help="of `predict`: a checkpoint's folder")
    arguments = parser.parse_args(argv)
    if arguments.what == "run" and not arguments.starts:
        parser.error("run needs --starts")
    if arguments.what == "predict" and not arguments.model:
        parser.error("predict needs --model")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    {"run": run, "table": table, "predict": predict, "reach": reach}[arguments.what](arguments)


if __name__ == "__main__":
    main()
