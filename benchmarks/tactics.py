"""What training does to tactics: how often `B:` is the one move that wins, before and after, by other recipes too.

    python -m benchmarks.tactics models --models runs/demo/checkpoint
    python -m benchmarks.tactics arms --minutes 3 --seeds 1 2 [--split dev]

`models` compares models with rookworld-nano on the tactics of a split. `arms` trains with the demo's recipe and with
variants of it for equal CPU time (`benchmarks.evidence`), measures the tactics and the three headlines on held-out
rows, and compares all with the base and with the demo's recipe. What has a result is not run again; the files lie under
`benchmarks/results/tactics/`. Intervals are paired, over games and seeds.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import RESULTS, ROOT, machine, shipped, write_report
from benchmarks.evidence import sizes, store
from benchmarks.evidence.arms import EXACT, of_recipe
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.statistics import draws
from recipes import grpo
from rookworld_trl.data.dataset import TACTICS_FILES
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.evaluation import evaluate
from rookworld_trl.evaluation.intervals import percentile_interval, ratios
from rookworld_trl.evaluation.problem_files import read_problems
from rookworld_trl.evaluation.problems import run_problems
from rookworld_trl.evaluation.suite import ModelAnswers
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.rewards.decisions import ChessPoints
from rookworld_trl.tasks import policy

FOLDER = RESULTS / "tactics"
TOKENS = 80
HEADLINES = ("best_legal", "skill", "exact")
MEAN_STAKE = 0.143  # of the train rows: win chance of the best move above the mean of the legal moves
CHECK, TACTICAL = "check: 0.25", "tactical: 0.25"


class Stakes(ChessPoints):
    """Decisions weigh as much as is at stake: the best value above the mean one, 1 on average, at most 3."""

    def __call__(self, row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
        found = super().__call__(row, completion)
        if row["legal_cp"]:
            chances = [policy.win_chance(cp) for cp in row["legal_cp"]]
            stake = min(3.0, (max(chances) - sum(chances) / len(chances)) / MEAN_STAKE)
            for decision in found["decisions"]:
                decision["weight"] *= stake
        return found


# Changes to the demo's recipe, and what finds the decision points.
ARMS: dict[str, tuple[Mapping[str, Any], type[ChessPoints]]] = {
    "exact": ({}, ChessPoints),
    "tactical_prompts": ({"policy_strata": f"{{{CHECK}, {TACTICAL}}}"}, ChessPoints),
    "stakes": ({}, Stakes),
    "both": ({"policy_strata": f"{{{CHECK}, {TACTICAL}}}"}, Stakes),
}


def solve(model: Any, tokenizer: Any, split: str) -> list[dict[str, Any]]:
    """Each problem's kind and scores, greedy."""
    problems = read_problems(TACTICS_FILES[split])
    answers = ModelAnswers(model, tokenizer, {"policy": 0.0}, TOKENS, batch_size=128)
    return [{"kind": item.group, **item.scores} for item in run_problems(answers, problems, "tactics").items]


def measure(model: Any, tokenizer: Any, split: str, items: tuple[int, int] | None) -> dict[str, Any]:
    """`tactics`: each problem's scores; `rows`: games, numerators and denominators of the headlines, by task."""
    found: dict[str, Any] = {"tactics": solve(model, tokenizer, split), "rows": {}}
    if items:
        rows = draw_of_each(shipped(split), dict(zip(("policy", "environment"), items, strict=True)))
        evaluation = evaluate(model, tokenizer, rows, modes=("greedy",), max_new_tokens=TOKENS, batch_size=128)
        for task, mode in evaluation.tasks_and_modes():
            metrics = [metric for metric in store.metrics_of(task) if metric.name in HEADLINES]
            own = evaluation.select(task, mode)
            top, bottom = store.terms([item.scores for item in own], metrics)
            found["rows"][task] = {
                "metrics": [metric.name for metric in metrics],
                "games": [item.game for item in own],
                "top": top.tolist(),
                "bottom": bottom.tolist(),
            }
    return found


def compare(sides: Mapping[str, Sequence[Mapping[str, Any]]], split: str, against: Sequence[str]) -> dict[str, Any]:
    """Values of each side and differences from the sides of `against`, each a list of runs (seeds)."""
    games, report = [problem.game for problem in read_problems(TACTICS_FILES[split])], {}
    blocks: dict[str, tuple[list[list[Any]], list[str]]] = {}
    kinds = [each["kind"] for each in next(iter(sides.values()))[0]["tactics"]]
    for kind in ("all", *sorted(set(kinds))):
        chosen = np.asarray([kind in ("all", own) for own in kinds], float)[:, None]
        solved = {
            name: [(np.asarray([[e["solved"]] for e in run["tactics"]]) * chosen, chosen) for run in runs]
            for name, runs in sides.items()
        }
        blocks[f"tactics, {kind}"] = (list(solved.values()), games)
    first = next(iter(sides.values()))[0]["rows"]
    for task in first:
        for number, metric in enumerate(first[task]["metrics"]):
            column = [
                [tuple(np.asarray(run["rows"][task][s])[:, [number]] for s in ("top", "bottom")) for run in runs]
                for runs in sides.values()
            ]
            blocks[metric] = (column, first[task]["games"])
    for metric, (column, clusters) in blocks.items():
        drawn = draws(column, clusters)[:, :, 0]
        names = list(sides)
        for i, name in enumerate(names):
            value = float(np.mean([ratios(*side)[0] for side in column[i]]))
            entry: dict[str, Any] = {"value": value, "interval": percentile_interval(drawn[:, i])}
            for other in against:
                if other in sides and names.index(other) < i:
                    difference = drawn[:, i] - drawn[:, names.index(other)]
                    entry[f"minus {other}"] = value - float(
                        np.mean([ratios(*side)[0] for side in column[names.index(other)]])
                    )
                    entry[f"interval, minus {other}"] = percentile_interval(difference)
            report.setdefault(metric, {})[name] = entry
    return report


def trivial(run: Mapping[str, Any]) -> dict[str, float]:
    players = ("random", "first", "material")
    return {name: float(np.mean([each[f"{name}.solved"] for each in run["tactics"]])) for name in players}


def models(arguments: argparse.Namespace) -> dict[str, Any]:
    sides = {}
    for name in (NANO, *arguments.models):
        sides["/".join(Path(name).parts[-3:])] = [measure(*load(name), arguments.split, None)]
    report = {"split": arguments.split, "positions": len(sides[NANO][0]["tactics"]), **machine("cpu")}
    return report | {"trivial players": trivial(sides[NANO][0]), "results": compare(sides, arguments.split, [NANO])}


def train(arm: str, minutes: float, seed: int) -> Path:
    """Train an arm, unless that is done; the folder of its model, with `facts.json`."""
    folder = ROOT / "runs" / "tactics" / f"{arm}-{minutes:g}min-seed{seed}"
    if not (folder / "facts.json").exists():
        changed, points = ARMS[arm]
        budget = Budget(60 * minutes)
        with tempfile.TemporaryDirectory() as other, mock.patch.object(grpo, "ChessPoints", points):
            model = of_recipe(EXACT, changed, False, sizes.NANO, Path(other), budget, seed)
        model.save_pretrained(folder)
        load(NANO)[1].save_pretrained(folder)
        write_report(folder / "facts.json", {"steps": len(budget.curve), "cpu_seconds": budget.curve[-1][0]})
        print(f"trained {folder.name}: {len(budget.curve)} steps", flush=True)
    return folder


def arms(arguments: argparse.Namespace) -> dict[str, Any]:
    items = (arguments.policy_items, arguments.environment_items)
    trained = [(seed, arm) for seed in arguments.seeds for arm in arguments.arms]
    folders = {(arm, seed): train(arm, arguments.minutes, seed) for seed, arm in trained}
    sides: dict[str, list[dict[str, Any]]] = {}
    for arm, seed in [("base", 0), *((arm, seed) for arm in arguments.arms for seed in arguments.seeds)]:
        name = "base" if arm == "base" else f"{arm}-{arguments.minutes:g}min-seed{seed}"
        path, folder = FOLDER / f"{arguments.split}-{name}.json", folders.get((arm, seed))
        if not path.exists():
            facts: dict[str, Any] = {"arm": arm, "seed": seed, **machine("cpu")}
            facts |= json.loads((folder / "facts.json").read_text()) if folder else {}
            found = measure(*load(str(folder or NANO)), arguments.split, items)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_report(path, facts | found)
            print(f"measured {name}", flush=True)
        sides.setdefault(arm, []).append(json.loads(path.read_text()))
    report = {"split": arguments.split, "minutes": arguments.minutes, "seeds": arguments.seeds, "items": items}
    report |= {"steps": {name: [run.get("steps") for run in runs] for name, runs in sides.items()}}
    return report | {"results": compare(sides, arguments.split, ["base", "exact"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["models", "arms"])
    parser.add_argument("--models", nargs="+", default=[], help="beside rookworld-nano")
    parser.add_argument("--arms", nargs="+", default=["exact", "tactical_prompts", "stakes"], choices=list(ARMS))
    parser.add_argument("--minutes", type=float, default=3.0, help="CPU minutes of training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--policy-items", type=int, default=800)
    parser.add_argument("--environment-items", type=int, default=400)
    arguments = parser.parse_args()
    report = {"models": models, "arms": arms}[arguments.what](arguments)
    name = arguments.what if arguments.what == "models" else f"{arguments.what}-{arguments.minutes:g}min"
    write_report(RESULTS / f"tactics-{arguments.split}-{name}.json", report)
    for metric, of_side in report["results"].items():
        for side, entry in of_side.items():
            parts = [
                f"{key} {value:.3f}" if isinstance(value, float) else "[{:.3f}, {:.3f}]".format(*value)
                for key, value in entry.items()
            ]
            print(f"{metric}: {side}: {' '.join(parts)}")


if __name__ == "__main__":
    main()
