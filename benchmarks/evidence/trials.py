"""Settings compared on dev, each against the arm it changes: how the recipes that ship were chosen.

    python -m benchmarks.evidence.trials --trials exact exact_muon_1e-3 --minutes 3 --seeds 1 2

Trains and measures what has no result yet, as `benchmarks.evidence` does, and compares each trial with its arm on the
same items. Every trial's result is kept, those of no use too: in `benchmarks/results/evidence/dev.parquet`, and all of
one length in `benchmarks/results/evidence/trials-3min.json`. The test split plays no part in this. A trial changes the
recipe as it was before any of them: KL coefficient 0.01, nothing that holds the format, a quarter of the `P:` prompts
in check (`exact_format_kl_0.1_checks_1_6` ships).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import machine, write_report
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import store
from benchmarks.evidence.arms import CHECKS, EXACT, SAMPLED, of_recipe
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.groups import CHECK, groups_of
from benchmarks.evidence.sizes import NANO
from benchmarks.evidence.statistics import draws
from rookworld_trl.evaluation.intervals import ratios
from rookworld_trl.modeling.loading import load
from rookworld_trl.rewards import decisions
from rookworld_trl.training import RookWorldGRPOTrainer
from rookworld_trl.training.supervised import MuonFactory

SHOWN = {"policy": ("best_legal", "skill", "parsed", "candidates_legal_distinct"), "environment": ("exact",)}


@dataclass(frozen=True)
class Trial:
    """An arm with other settings: keys of its recipe, constants of `rewards.decisions`, the rate of Muon (0: AdamW)."""

    recipe: str = EXACT
    keys: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    muon: float = 0.0

    def train(self, folder: Path, budget: Budget, seed: int) -> Any:
        keys = {"beta": 0.01, "policy_strata": CHECKS, **self.keys}
        with ExitStack() as patches:
            for name, value in {"FORMAT_WEIGHT": 0.0, **self.constants}.items():
                patches.enter_context(mock.patch.object(decisions, name, value))
            if self.muon:
                patches.enter_context(mock.patch.object(RookWorldGRPOTrainer, "create_optimizer", with_muon(self.muon)))
            return of_recipe(self.recipe, keys, False, NANO, folder, budget, seed)


def with_muon(rate: float) -> Any:
    def create_optimizer(trainer: Any, model: Any = None) -> Any:
        trainer.optimizer = MuonFactory()(trainer.model, muon_lr=rate, adamw_lr=trainer.args.learning_rate)
        return trainer.optimizer

    return create_optimizer


TRIALS = {
    "exact": Trial(),
    "exact_rate_1e-4": Trial(keys={"learning_rate": 1e-4}),
    "exact_rate_4e-4": Trial(keys={"learning_rate": 4e-4}),
    "exact_muon_1e-3": Trial(muon=1e-3),
    "exact_answer_tokens_1": Trial(constants={"ANSWER_TOKENS_WEIGHT": 1.0}),
    "exact_determined_1": Trial(constants={"DETERMINED_WEIGHT": 1.0}),
    "exact_no_kl": Trial(keys={"beta": 0.0}),
    "exact_kl_0.05": Trial(keys={"beta": 0.05}),
    "exact_kl_0.1": Trial(keys={"beta": 0.1}),
    "exact_kl_0.2": Trial(keys={"beta": 0.2}),
    "exact_format": Trial(constants={"FORMAT_WEIGHT": 0.5}),
    "exact_format_kl_0.1": Trial(keys={"beta": 0.1}, constants={"FORMAT_WEIGHT": 0.5}),
    "exact_format_kl_0.1_no_checks": Trial(
        keys={"beta": 0.1, "policy_strata": "null"}, constants={"FORMAT_WEIGHT": 0.5}
    ),
    "exact_format_kl_0.1_checks_1_12": Trial(
        keys={"beta": 0.1, "policy_strata": "{check: 0.0833}"}, constants={"FORMAT_WEIGHT": 0.5}
    ),
    "exact_format_kl_0.1_checks_1_6": Trial(
        keys={"beta": 0.1, "policy_strata": "{check: 0.1667}"}, constants={"FORMAT_WEIGHT": 0.5}
    ),
    "exact_format_kl_0.1_checks_1_6_weight_2": Trial(
        keys={"beta": 0.1, "policy_strata": "{check: 0.1667}"}, constants={"FORMAT_WEIGHT": 2.0}
    ),
    "exact_groups_of_4": Trial(keys={"num_generations": 4, "gradient_accumulation_steps": 4}),
    "exact_half_environment": Trial(keys={"mix_env_ratio": 0.5}),
    "exact_small_batch": Trial(keys={"gradient_accumulation_steps": 1}),
    "exact_best_legal_0.4": Trial(constants={"BEST_LEGAL": 0.4}),
    "exact_no_checks": Trial(keys={"policy_strata": "null"}),
    "exact_tactical": Trial(keys={"policy_strata": "{check: 0.25, tactical: 0.25}"}),
    "sampled": Trial(SAMPLED),
    "sampled_kl_0.1": Trial(SAMPLED, keys={"beta": 0.1}),
    "sampled_rate_4e-4": Trial(SAMPLED, keys={"learning_rate": 4e-4}),
    "sampled_small_groups": Trial(SAMPLED, keys={"num_generations": 8}),
}


def run(name: str, minutes: float, seed: int, arguments: argparse.Namespace) -> None:
    result, budget = store.name_of(name, minutes, seed, store.TRIALS), Budget(60 * minutes, arguments.updates)
    if store.has("dev", result):
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = TRIALS[name].train(Path(scratch), budget, seed)
    model.save_pretrained(kept := evidence.MODELS / result.replace("/", "-"))
    load(NANO.folder)[1].save_pretrained(kept)
    evaluation = evidence.measure(model, load(NANO.folder)[1], NANO.tokens, arguments, best_eval=False)
    trial = TRIALS[name]
    facts: dict[str, Any] = {"arm": name, "minutes": minutes, "seed": seed, "recipe": trial.recipe}
    facts |= {"keys": dict(trial.keys), "constants": dict(trial.constants), "muon": trial.muon, "split": "dev"}
    facts |= {"steps": len(budget.curve), "samples": budget.samples, **machine("cpu")}
    store.save("dev", result, store.result_of(evaluation, facts))
    print(f"{time.strftime('%H:%M:%S')} {result}: {facts['steps']} steps", flush=True)


def compare(found: dict[str, list[store.Result]], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Each trial's value of each metric, and its difference from its arm's and from that of each trial whose name its
    own begins with, on the same items, over seeds and games. `P:` items in check and not have rows of their own.

    Args:
        groups: of each item, by its key, as `groups_of` names them.
    """
    rows: list[dict[str, Any]] = []
    names = list(found)
    first = found[names[0]][0]
    apart = {"policy": CHECK.values()}
    for task, mode, group in ((*term, group) for term in first.terms for group in ("", *apart.get(term[0], ()))):
        inside = np.asarray([not group or group in groups[key] for key in first.keys[task]])
        games = [game for game, chosen in zip(first.games[task], inside, strict=True) if chosen]
        sides = [[tuple(each[inside] for each in run.terms[task, mode]) for run in found[name]] for name in names]
        drawn = draws(sides, games)
        for column, metric in enumerate(store.metrics_of(task)):
            if metric.name not in SHOWN[task]:
                continue
            for i, name in enumerate(names):
                value = float(np.mean([ratios(*side)[column] for side in sides[i]]))
                row = {"trial": name, "metric": metric.name, "mode": mode, "group": group, "seeds": len(sides[i])}
                row |= {"value": value}
                for j, other in enumerate(names):
                    if name.startswith(f"{other}_"):
                        difference = drawn[:, i, column] - drawn[:, j, column]
                        change = {"difference": float(np.nanmean(difference)), **evidence.interval(difference)}
                        row.setdefault("beside", {})[other] = change
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="*", default=[], choices=[*TRIALS, []])
    parser.add_argument("--minutes", type=float, default=3.0, help="CPU minutes of training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--updates", type=int, help="end after so many, whatever the time; on another machine")
    parser.add_argument("--policy-items", type=int, default=1500)
    parser.add_argument("--environment-items", type=int, default=900)
    arguments = parser.parse_args()
    arguments.split = "dev"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for seed in arguments.seeds:
        for name in arguments.trials:
            run(name, arguments.minutes, seed, arguments)
    found: dict[str, list[store.Result]] = {}
    middle = f"-{arguments.minutes:g}min-seed"
    for result in (name for name in store.names("dev", store.TRIALS) if middle in name):
        name = result.removeprefix(f"{store.TRIALS}/").partition(middle)[0]
        found.setdefault(name, []).append(store.read("dev", result))
    rows = compare(found, groups_of("dev"))
    steps = {name: [result.facts["steps"] for result in results] for name, results in found.items()}
    settings = {name: asdict(TRIALS[name]) for name in found if name in TRIALS}
    write_report(
        store.FOLDER / f"trials-{arguments.minutes:g}min.json",
        {"split": "dev", "minutes": arguments.minutes, "steps": steps, "settings": settings, "trials": rows},
    )
    for row in rows:
        where = ", ".join(filter(None, (row["metric"], row["mode"], row["group"])))
        print(f"{row['trial']} ({row['seeds']}): {where} {row['value']:.3f}")
        for other, change in row.get("beside", {}).items():
            print(f"    {change['difference']:+.3f} [{change['ci_low']:+.3f}, {change['ci_high']:+.3f}] beside {other}")


if __name__ == "__main__":
    main()
