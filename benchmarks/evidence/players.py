"""Trivial players on the items of a stored run: what they get where the run's own metrics are counted."""

import functools
from typing import Any

from benchmarks.common import shipped
from benchmarks.evidence import store
from rookworld_trl.chess.accuracy import METRICS, PLAYERS, baseline_scores, item_key
from rookworld_trl.measuring import Item, Result


@functools.cache
def _rows(split: str) -> dict[str, Any]:
    return {item_key(row): row for row in shipped(split)}


@functools.cache
def _scores(split: str, key: str) -> dict[str, float]:
    return baseline_scores(_rows(split)[key])


def trivial_players(split: str, run: store.Result) -> dict[str, dict[str, float]]:
    """By metric and player, greedy: skill over the items on which the run's own move is legal, all else over all."""
    found = {}
    for task, keys in run.keys.items():
        scores = [_scores(split, key) for key in keys]
        if task == "policy":
            names = [metric.name for metric in store.metrics_of(task)]
            legal = run.terms[task, "greedy"][0][:, names.index("best_legal")]
            scores = [{**each, "best_legal": float(own)} for each, own in zip(scores, legal, strict=True)]
        items = [Item(key, each) for key, each in zip(keys, scores, strict=True)]
        found |= Result(task, METRICS[task], items, players=PLAYERS[task]).baselines()  # type: ignore[index]
    return found
