"""GRPO in its forms against every cheaper way, from one checkpoint, at equal CPU time, with seeds.

    python -m benchmarks.evidence run --factors 0.5 1 2 --minutes 3 --seeds 1 --split dev   # trials, before test
    python -m benchmarks.evidence run --minutes 3 --seeds 1 2 3 4 5 --split test
    python -m benchmarks.evidence table --split test --minutes 3 --groups    # and the page's figure
    python -m benchmarks.evidence run --size 124m --arms exact sampled --minutes 5    # on a GPU, after `make gpu`

`run` trains and measures what has no result yet, one after the other; stop it and run it again at will. The trained
models lie under `runs/evidence/`. The rate falls to 0 by the end of a run, so that runs of two lengths are two runs.
`table` compares arms on the same items; what counts as a win is written in `benchmarks/evidence/RULE.md`. Results of
another size, start or device have names of their own, and tables of their own (`table --size 124m`).
"""

import argparse
import contextlib
import gc
import hashlib
import itertools
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, machine, shipped, write_report
from benchmarks.evidence import report, store
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.sizes import NANO, SIZES, Size
from rookworld_trl.chess import ParseError, policy
from rookworld_trl.chess.accuracy import evaluate, score
from rookworld_trl.chess.dataset import draw_of_each
from rookworld_trl.measuring import Result
from rookworld_trl.modeling.loading import load

MODELS = ROOT / "runs" / "evidence"
SHOWN = "test-3min"  # the table that the page shows
FIGURE = ROOT / "docs" / "images" / "evidence.svg"
TEMPERATURE = 0.7


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

    arguments.arms = arguments.arms or [*ARMS]
    if unknown := sorted(set(arguments.arms) - {*ARMS, report.BASE, report.FREE}):
        raise SystemExit(f"unknown arms {unknown}; there are {', '.join([report.BASE, *ARMS])}")
    trained = [arm for arm in arguments.arms if arm in ARMS]
    size = size_of(arguments)
    check_possible(size)
    if size.device == "cuda":  # for every arm alike, and for what is measured; some trainers turn it on for the process
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    name, weights = size.results, weights_of(size.folder)
    jobs: list[Any] = [(0.0, 0, report.BASE, None)]
    jobs += [(0.0, 0, report.FREE, None)] if arguments.start is None or name is None else []
    jobs += itertools.product(arguments.minutes, arguments.seeds, trained, arguments.factors)
    for minutes, seed, arm, factor in jobs:
        label = arm if factor is None else f"{arm}_rate_{factor:g}"
        result = store.name_of(label, minutes, seed, name)
        if store.has(arguments.split, result):
            if name and store.read(arguments.split, result).facts["start"] != weights:
                where = f"{result} in {store.path_of(arguments.split)}"
                raise SystemExit(f"{where} is of other weights than {size.folder}; pass another --start-name")
            continue
        if size.device == "cuda":  # the trainers of earlier arms are held by cycles
            gc.collect()
            torch.cuda.empty_cache()
        budget = Budget(60 * minutes, arguments.updates, size.device)
        rate = size.learning_rate * ((ARMS[arm].factor if factor is None else factor) if arm in ARMS else 1)
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(size.folder)
            if arm in ARMS:
                model = ARMS[arm].train(replace(size, learning_rate=rate), Path(folder), budget, seed)
                kept = MODELS / result.replace("/", "-")
                model.save_pretrained(kept)
                tokenizer.save_pretrained(kept)
            evaluation = measure(model.to(size.device), tokenizer, size.tokens, arguments, best_eval=arm == report.FREE)
        facts = {"arm": label, "minutes": minutes, "seed": seed, "samples": budget.samples}
        facts |= {"learning_rate": rate if arm in ARMS else None}
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
        known = {name: values[name]["value"] for name in report.COMPARED if name in values}
        known = {name: value for name, value in known.items() if value is not None}  # skill, of no legal move
        parts.append(" ".join([each.mode, *(f"{name} {value:.3f}" for name, value in known.items())]))
    return ", ".join(parts)


def stored(split: str, start: str | None) -> dict[tuple[str, float], list[store.Result]]:
    """All runs of a start, by arm and minutes."""
    found: dict[tuple[str, float], list[store.Result]] = {}
    for name in store.names(split, start):
        each = store.read(split, name)
        found.setdefault((each.facts["arm"], each.facts["minutes"]), []).append(each)
    return found


def table(arguments: argparse.Namespace) -> None:
    """The arms that are stored at one budget, or those that are named, beside the base."""
    start, minutes = size_of(arguments).results, arguments.minutes[0]
    found = stored(arguments.split, start)
    named = [asked.partition("@") for asked in arguments.arms or ()]
    chosen = {arm: float(own or minutes) for arm, _, own in named} or {arm: m for arm, m in found if m == minutes}
    runs = {arm: found[arm, 0.0] for arm in (report.BASE, report.FREE) if (arm, 0.0) in found}
    runs |= {arm: found[arm, m] for arm, m in sorted(chosen.items()) if (arm, m) in found and m}
    if missing := [f"{arm} of {m:g} minutes" for arm, m in chosen.items() if arm not in runs]:
        raise SystemExit(f"{store.path_of(arguments.split)} holds no runs of {', '.join(missing)}")
    if report.BASE not in runs or len(runs.keys() - {report.BASE, report.FREE}) < 1:
        of_start = "" if start is None else f" of {start}"
        where = store.path_of(arguments.split)
        raise SystemExit(f"{where} holds no runs{of_start} of {minutes:g} minutes to compare; `run` makes them")
    made = report.make(arguments.split, runs, arguments.ours, arguments.groups)
    name = arguments.name or "-".join(filter(None, (start, arguments.split, f"{minutes:g}min")))
    write_report(store.FOLDER / f"{name}.json", made)
    if name == SHOWN:
        report.draw(made, FIGURE)
    print(report.as_markdown(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--arms", nargs="+", help="of a table, ARM or ARM@MINUTES; default: all of that length")
    parser.add_argument(
        "--minutes", nargs="+", type=float, default=[4.0], help="of training, CPU time; on a GPU the clock's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--size", choices=SIZES, default="nano", help="124m: what `make gpu` trains, on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="another than the size's")
    parser.add_argument("--start", help="folder of the checkpoint that every arm starts from; default: the size's")
    parser.add_argument("--start-name", help="of results from another start than the default; else its folder's name")
    parser.add_argument("--factors", nargs="+", type=float, default=[None], help="of the rate: trials of each arm")
    parser.add_argument("--ours", default="exact", help="the arm that a table compares with every other one")
    parser.add_argument("--groups", action="store_true", help="the headlines by colour, check and stratum too")
    parser.add_argument("--name", help="of a table's file")
    parser.add_argument("--updates", type=int, help="end after so many, whatever the time; on another machine")
    parser.add_argument("--policy-items", type=int)
    parser.add_argument("--environment-items", type=int)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    {"run": run, "table": table}[arguments.what](arguments)


if __name__ == "__main__":
    main()
