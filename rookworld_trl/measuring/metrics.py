"""Metrics, each a ratio of sums over items, and their intervals. Which ones there are, whoever measures says.

Sum(numerator) / sum(denominator) covers means (denominator 1), recall (positives), precision (predictions) and F1,
so intervals and paired comparisons need one implementation (`intervals`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypedDict

import numpy as np

from rookworld_trl.measuring.intervals import (
    MIN_CLUSTERS,
    Array,
    Bounds,
    bootstrap_ratios,
    clusters_behind,
    percentile_interval,
    ratios,
    sums_by_cluster,
    wilson,
)

# Enough for the bounds of single values, of which there are hundreds; comparisons take five times as many.
DESCRIPTIVE_RESAMPLES = 2_000

Scores = Mapping[str, float]
Term = Callable[[Scores], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as in JSON and in `compare`.
        label: as in tables.
        numerator, denominator: an item's terms, from its scores.
        proportion: both terms are 0 or 1 and numerator <= denominator: Wilson's interval applies.
        format: "percent", or a format spec for what is no share.
        better: 1 if more is better, -1 if less is, 0 for what only describes the text: a change in the other direction
            is a loss.
        keeps: scores of the model that stay in place where a trivial player answers in its stead, such as those that
            say which items count.
    """

    name: str
    label: str
    numerator: Term
    denominator: Term = lambda scores: 1.0
    proportion: bool = True
    format: str = "percent"
    better: int = 1
    keeps: tuple[str, ...] = ()

    @property
    def at_most_1(self) -> bool:
        """Shares, and what has three digits: skill and rewards. Others (tokens, plies, candidates) are counts."""
        return self.format in ("percent", ".3f")

    def at_an_end(self, value: float) -> bool:
        """Whether no item can have pulled the value further: all are alike there, so that resampling has no width."""
        return (value == 1 and self.at_most_1) or (value == 0 and self.format == "percent")


class Estimate(TypedDict):
    """A metric's value on a group of items, with its 95 % interval.

    `value` is None where the metric is undefined (no positives, ...), and so are the bounds there. Without an interval
    it stands alone where fewer than `MIN_CLUSTERS` clusters (games; items, where none share one) bear on it.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None
    clusters: int
    numerator: float
    denominator: float


def share(name: str, label: str, better: int = 1) -> Metric:
    """Of a score that is 0 or 1."""
    return Metric(name, label, itemgetter(name), better=better)


def mean(name: str, label: str, format: str = ".3f", better: int = 1) -> Metric:
    """Of any score."""
    return Metric(name, label, itemgetter(name), proportion=False, format=format, better=better)


def ratio(name: str, label: str, of: str, format: str = "percent", better: int = 1) -> Metric:
    """Of a score's sum to another's."""
    return Metric(name, label, itemgetter(name), itemgetter(of), False, format, better)


def terms(scores: Sequence[Scores], metrics: Sequence[Metric]) -> tuple[Array, Array]:
    """Numerators and denominators of every item and metric, each (items, metrics)."""
    shape = (len(scores), len(metrics))
    top = np.array([[m.numerator(s) for m in metrics] for s in scores], dtype=np.float64).reshape(shape)
    bottom = np.array([[m.denominator(s) for m in metrics] for s in scores], dtype=np.float64).reshape(shape)
    return top, bottom


def estimate(
    scores: Sequence[Scores], metrics: Sequence[Metric], games: Sequence[str], seed: int = 0
) -> dict[str, Estimate]:
    """Value and 95 % interval of every metric: Wilson for proportions, percentile bootstrap for the others.

    A share of exactly 0 or 1 has Wilson's interval at the number of clusters: resampling what is all alike has no
    width. Below `MIN_CLUSTERS` clusters there is no interval.

    Args:
        games: of each item, "" for none. Where two items share a game, all intervals are bootstraps over games.
    """
    top, bottom = terms(scores, metrics)
    values = ratios(top, bottom)
    whole = not shared(games)
    top, bottom = (sums_by_cluster(array, games) for array in (top, bottom))
    clusters = clusters_behind(bottom)
    others = [i for i, metric in enumerate(metrics) if not (metric.proportion and whole)]
    draws = bootstrap_ratios(top[:, others], bottom[:, others], resamples=DESCRIPTIVE_RESAMPLES, seed=seed)
    result: dict[str, Estimate] = {}
    for i, metric in enumerate(metrics):
        numerator, denominator, n = float(top[:, i].sum()), float(bottom[:, i].sum()), int(clusters[i])
        value: float | None = None
        interval: Bounds = (None, None)
        if denominator:
            value = float(values[i])
            if n >= MIN_CLUSTERS and i not in others:
                interval = wilson(numerator, denominator)
            elif n >= MIN_CLUSTERS and metric.at_an_end(value):
                interval = wilson(n * value, n)
            elif i in others:
                interval = percentile_interval(draws[:, others.index(i)], n)
        low, high = interval
        result[metric.name] = Estimate(
            value=value, ci_low=low, ci_high=high, clusters=n, numerator=numerator, denominator=denominator
        )
    return result


def shared(games: Sequence[str]) -> bool:
    """Whether any two items are of one game, so that they aren't independent."""
    named = [game for game in games if game]
    return len(set(named)) < len(named)
