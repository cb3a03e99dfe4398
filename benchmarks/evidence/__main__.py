"""GRPO in its forms against every cheaper way, from one checkpoint, at equal CPU time, with seeds.

    python -m benchmarks.evidence run --arms exact sampled gold soft --minutes 2 4 8 --seeds 1 2 3 --split dev
    python -m benchmarks.evidence table --split dev --minutes 8
    python -m benchmarks.evidence run --size 124m --arms exact sampled --minutes 5    # on a GPU, after `make gpu`

`run` trains and measures what has no result yet, one after the other; stop it and run it again at will. The trained
models lie under `runs/evidence/`. Each point of a curve is a run of its own, whose rate falls to 0 by its end. `table`
compares all arms by pairs on the same items; what counts as a win is written in `benchmarks/evidence/RULE.md`. Results
of another size, start or device have names of their own, and tables of their own (`table --size 124m`).
"""

import argparse
import contextlib
import gc
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, machine, shipped, write_report
from benchmarks.evidence import store
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.players import trivial_players
from benchmarks.evidence.sizes import NANO, SIZES, Size
from benchmarks.evidence.statistics import clusters, draws, holm, p_value
from rookworld_trl.chess import ParseError, policy
from rookworld_trl.chess.accuracy import evaluate, score
from rookworld_trl.chess.dataset import draw_of_each
from rookworld_trl.measuring import Result
from rookworld_trl.measuring.intervals import Array, percentile_interval, ratios
from rookworld_trl.modeling.loading import load

MODELS = ROOT / "runs" / "evidence"
BASE, FREE = "base", "argmax_evals"  # no training; and, of the base's answers, the candidate with the best eval as B
TEMPERATURE = 0.7
MATERIAL = "most material"  # the trivial player who is better than the base
COMPARED = ("best_legal", "skill", "exact")  # the three headlines: what a win is counted on


def measure(
    model: Any, tokenizer: Any, max_new_tokens: int, arguments: argparse.Namespace, best_eval: bool
) -> list[Result]:
    limits = {"policy": arguments.policy_items, "environment": arguments.environment_items}
    rows = draw_of_each(shipped(arguments.split), limits)
    settings = {"temperature": TEMPERATURE, "max_new_tokens": max_new_tokens, "batch_size": 128, "seed": 1}
    evaluation = evaluate(model, tokenizer, rows, **settings)
    return with_best_evals(evaluation, list(rows)) if best_eval else evaluation


def with_best_evals(evaluation: list[Result], rows: list[dict[str, Any]]) -> list[Result]:
    """The same answers, `B:` replaced by the candidate that the answer itself gives the highest eval (the first)."""
    found: list[Result] = []
    for each in evaluation:
        texts = []
        for item in each.items:
            text = item.completion
            if each.name == "policy":
                with contextlib.suppress(ParseError):
                    answer = policy.parse(text)
                    best = max(zip(answer.evals, answer.moves, strict=False), key=lambda pair: pair[0])[1]
                    text = text[: text.rindex(" B: ")] + f" B: {best}"
            texts.append(text)
        found += score([row for row in rows if row["task"] == each.name], texts, each.mode, each.settings)
    return found


def size_of(arguments: argparse.Namespace) -> Size:
    """The size that was asked for, on the start and device that were asked for, under a name of its own."""
    size = SIZES[arguments.size]
    if arguments.device not in (None, size.device):
        size = replace(size, device=arguments.device, results=f"{arguments.size}-{arguments.device}")
    if arguments.start is not None:
        folder = Path(arguments.start)
        if size.results or weights_of(folder) != weights_of(NANO.folder):
            size = replace(size, results="-".join(filter(None, (folder.resolve().name, size.results))))
        size = replace(size, folder=folder)
    return replace(size, results=arguments.start_name or size.results)


def check_possible(size: Size) -> None:
    """Raises:
    SystemExit: the device or the checkpoint is not there.
    """
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU, which this comparison is made for; --device cpu goes without, slowly")
    if not (size.folder / "config.json").exists():
        remedy = "run `make gpu` first, or give" if size.folder == SIZES["124m"].folder else "give"
        raise SystemExit(f"{size.folder} holds no checkpoint; {remedy} another folder by --start")


def run(arguments: argparse.Namespace) -> None:
    from benchmarks.evidence.arms import ARMS  # which loads the trainers; a table needs none

    if unknown := sorted(set(arguments.arms) - {*ARMS, BASE, FREE}):
        raise SystemExit(f"unknown arms {unknown}; there are {', '.join([BASE, *ARMS])}")
    trained = [arm for arm in arguments.arms if arm in ARMS]
    size = size_of(arguments)
    check_possible(size)
    if size.device == "cuda":  # for every arm alike, and for what is measured; some trainers turn it on for the process
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    name, weights = size.results, weights_of(size.folder)
    jobs = [(0.0, 0, BASE)] + ([(0.0, 0, FREE)] if arguments.start is None or name is None else [])
    jobs += [(minutes, seed, arm) for minutes in arguments.minutes for seed in arguments.seeds for arm in trained]
    for minutes, seed, arm in jobs:
        result = store.name_of(arm, minutes, seed, name)
        if store.has(arguments.split, result):
            if name and store.read(arguments.split, result).facts["start"] != weights:
                where = f"{result} in {store.path_of(arguments.split)}"
                raise SystemExit(f"{where} is of other weights than {size.folder}; pass another --start-name")
            continue
        if size.device == "cuda":  # the trainers of earlier arms are held by cycles
            gc.collect()
            torch.cuda.empty_cache()
        budget = Budget(60 * minutes, arguments.updates, size.device)
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(size.folder)
            if arm in ARMS:
                model = ARMS[arm].train(size, Path(folder), budget, seed)
                kept = MODELS / result.replace("/", "-")
                model.save_pretrained(kept)
                tokenizer.save_pretrained(kept)
            evaluation = measure(model.to(size.device), tokenizer, size.tokens, arguments, best_eval=arm == FREE)
        facts = {"arm": arm, "minutes": minutes, "seed": seed, "samples": budget.samples}
        facts |= {"learning_rate": size.learning_rate if arm in ARMS else None}
        facts |= {"updates_given": arguments.updates if minutes else None, "steps": len(budget.curve)}
        seconds = "cpu_seconds" if size.device == "cpu" else "seconds"
        facts |= {seconds: budget.curve[-1][0] if budget.curve else 0.0, "split": arguments.split}
        facts |= {"temperature": TEMPERATURE, "start": weights, **machine(size.device)}
        store.save(arguments.split, result, store.result_of(evaluation, facts))
        done = f"{result}: {facts['steps']} steps, {facts['samples']} samples"
        print(f"{time.strftime('%H:%M:%S')} {done}; {_line(evaluation)}", flush=True)


def weights_of(folder: str | Path) -> str:
    """The first digits of the SHA-256 of a checkpoint's weights, "" where they are not in one file."""
    file = Path(folder) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else ""


def _line(evaluation: Any) -> str:
    parts = []
    for each in evaluation:
        values = each.estimates()
        known = {name: values[name]["value"] for name in COMPARED if name in values}
        known = {name: value for name, value in known.items() if value is not None}  # skill, of no legal move
        parts.append(" ".join([each.mode, *(f"{name} {value:.3f}" for name, value in known.items())]))
    return ", ".join(parts)


def table(arguments: argparse.Namespace) -> None:
    """All arms that are stored at one budget, each against every other."""
    start = size_of(arguments).results
    by_budget: dict[str, dict[float, list[store.Result]]] = {}
    for name in store.names(arguments.split, start):
        found = store.read(arguments.split, name)
        arm = found.facts["arm"]
        if not arm.startswith("sampled_"):  # parts of `sampled` left out one by one, which had a table of their own
            by_budget.setdefault(arm, {}).setdefault(found.facts["minutes"], []).append(found)
    minutes = arguments.minutes[0]
    runs = {arm: of[m] for arm, of in by_budget.items() for m in (0.0, minutes) if m in of}
    if BASE not in runs or len(runs.keys() - {BASE, FREE}) < 1:
        of_start = "" if start is None else f" of {start}"
        where = store.path_of(arguments.split)
        raise SystemExit(f"{where} holds no runs{of_start} of {minutes:g} minutes to compare; `run` makes them")
    arms = [BASE, *sorted(set(runs) - {BASE})]
    first = runs[BASE][0]
    for arm in arms:
        for each in runs[arm]:
            if each.keys != first.keys:
                raise SystemExit(f"{arm}, seed {each.facts['seed']}: other items than the base's; remove it and run")
    values: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for task, mode in first.terms:
        whole = [[each.terms[task, mode] for each in runs[arm]] for arm in arms]
        drawn, count = draws(whole, first.games[task]), clusters(whole, first.games[task])
        for column, metric in enumerate(store.metrics_of(task)):
            what = {"task": task, "mode": mode, "metric": metric.name}
            for i, arm in enumerate(arms):
                sides = [each.terms[task, mode] for each in runs[arm]]
                by_seed = [float(ratios(top, bottom)[column]) for top, bottom in sides]
                mean = {"mean": float(np.mean(by_seed)), "by_seed": by_seed}
                values.append({**what, "arm": arm, **mean, **interval(drawn[:, i, column], count[column])})
                if metric.name == "skill" and mode == "greedy":  # over the items that each run moves legally
                    players = [trivial_players(arguments.split, run)["skill"] for run in runs[arm]]
                    known = [each[MATERIAL] for each in players if each]  # none, where a run moves nowhere legally
                    values[-1][MATERIAL] = float(np.mean(known)) if known else None
                for j in range(i):
                    difference = drawn[:, i, column] - drawn[:, j, column]
                    if np.isnan(difference).all():  # a metric of which these items have none
                        continue
                    pair = {**what, "arm": arm, "against": arms[j], "difference": float(np.nanmean(difference))}
                    pair |= {**interval(difference, count[column]), "p_value": p_value(difference)}
                    if metric.name in COMPARED and mode == "greedy":
                        pairs.append(pair)
                    if arms[j] == BASE and below(pair):
                        losses.append(pair)
    for pair, adjusted in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_holm"] = adjusted
        pair["win"] = adjusted < 0.05 and (below(pair) or above(pair))
    players = trivial_players(arguments.split, first)
    report: dict[str, Any] = {"split": arguments.split}
    report["trivial players"] = {name: of for name, of in players.items() if name in COMPARED}
    for name, fact in (("minutes", "minutes"), ("updates", "steps"), ("samples", "samples")):
        report[name] = {arm: [each.facts[fact] for each in runs[arm]] for arm in arms}
    report |= {"values": values, "pairs": pairs, "losses": losses}
    of = f"{minutes:g}min"
    write_report(store.FOLDER / f"{'-'.join(filter(None, (start, arguments.split, of)))}.json", report)
    print(as_markdown(report))


def interval(drawn: Array, games: int) -> dict[str, float | None]:
    """Bounds, None over too few games; 0 is 0, not -1e-17."""
    low, high = (None if bound is None else round(bound, 12) + 0.0 for bound in percentile_interval(drawn, int(games)))
    return {"ci_low": low, "ci_high": high}


def below(row: Mapping[str, Any]) -> bool:
    """Whether a row's whole interval is; over too few games there is none."""
    return row["ci_high"] is not None and row["ci_high"] < 0


def above(row: Mapping[str, Any]) -> bool:
    return row["ci_low"] is not None and row["ci_low"] > 0


def shown(row: Mapping[str, Any], sign: str = "") -> str:
    """A row's interval, behind a space, or why there is none."""
    return " (too few games)" if row["ci_low"] is None else f" [{row['ci_low']:{sign}.3f}, {row['ci_high']:{sign}.3f}]"


def as_markdown(report: dict[str, Any]) -> str:
    """The three headlines of every arm, greedy, with wins (bold) and losses (italic) against the base by the rule, and
    the skill of whoever takes most material on the items that the arm moves legally; what trivial players reach on the
    base's; and every metric that an arm has significantly lowered."""
    greedy = [row for row in report["values"] if row["mode"] == "greedy" and row["metric"] in COMPARED]
    values = {(row["arm"], row["metric"]): row for row in greedy}
    marks = {
        (pair["arm"], pair["metric"]): "**" if pair["difference"] > 0 else "*"
        for pair in report["pairs"]
        if pair["against"] == BASE and pair["win"]
    }
    lines = ["| arm | seeds | " + " | ".join(COMPARED) + f" | skill of {MATERIAL}, same items |"]
    lines += ["|---|---:|" + "---|" * len(COMPARED) + "---:|"]
    for arm in dict.fromkeys(arm for arm, _ in values):
        cells = []
        for name in COMPARED:
            row, mark = values[arm, name], marks.get((arm, name), "")
            cells.append(f"{mark}{row['mean']:.3f}{mark}{shown(row)}")
        material = values[arm, "skill"][MATERIAL]
        cells.append("" if material is None else f"{material:.3f}")
        lines.append(f"| {arm} | {len(values[arm, COMPARED[0]]['by_seed'])} | " + " | ".join(cells) + " |")
    players = dict.fromkeys(player for of_metric in report["trivial players"].values() for player in of_metric)
    for player in players:
        reached = [report["trivial players"].get(name, {}).get(player) for name in COMPARED]
        cells = ["" if value is None else f"{value:.3f}" for value in reached]
        lines.append(" | ".join([f"| ({player})", "", *cells, "", ""]).replace("  ", " ").rstrip())
    lines += ["", "Significantly below the base:" + ("" if report["losses"] else " nothing."), ""]
    for loss in report["losses"]:
        where = f"{loss['arm']}: {loss['task']} {loss['metric']}, {loss['mode']}"
        lines.append(f"- {where} {loss['difference']:+.3f}{shown(loss, '+')}")
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--arms", nargs="+", default=["exact", "sampled"])
    parser.add_argument(
        "--minutes", nargs="+", type=float, default=[4.0], help="of training, CPU time; on a GPU the clock's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--size", choices=SIZES, default="nano", help="124m: what `make gpu` trains, on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="another than the size's")
    parser.add_argument("--start", help="folder of the checkpoint that every arm starts from; default: the size's")
    parser.add_argument("--start-name", help="of results from another start than the default; else its folder's name")
    parser.add_argument("--updates", type=int, help="end after so many, whatever the time; on another machine")
    parser.add_argument("--policy-items", type=int)
    parser.add_argument("--environment-items", type=int)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    (run if arguments.what == "run" else table)(arguments)


if __name__ == "__main__":
    main()
