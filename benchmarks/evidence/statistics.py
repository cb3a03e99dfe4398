"""Intervals and p-values over seeds and games at once, by formula: nothing is drawn, so nothing turns with a seed.

An arm's statistic is the mean over its runs (seeds) of a ratio of sums over items. Two sources of chance are in it:
which positions the split holds, of which whole games are alike, and which seeds were run. Each is a part with a
variance and degrees of freedom of its own:

* the games': the delete-one-game jackknife of the statistic, or of a difference of two arms on the same games (Efron
  and Tibshirani 1993, chapter 11), with n - 1 degrees for n games;
* each trained arm's seeds': the variance of its runs' values, over their number, with n - 1 degrees for n seeds. What
  was not trained has no such part.

The half-width is the root of the parts' summed squares, each part's own Student's t times its standard error (as
Cochran 1964 combines two). Welch and Satterthwaite's one number of degrees for all parts is not used: where a part is
known from two seeds, it is a guess, and its intervals hold in 86 of 100 cases instead of 95. What happens to an item by
a seed's chance alone is counted in both parts, so intervals are rather too wide than too narrow. A p-value is the level
at which the interval would end at 0.

Below `MIN_CLUSTERS` games, or with one seed of a trained arm, there is no interval and no verdict.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rookworld_trl.measuring.intervals import MIN_CLUSTERS, Array, clusters_behind, ratios, sums_by_cluster

SMALLEST = 1e-9  # the least p-value that is told: below it, quantiles lose their digits


@dataclass(frozen=True)
class Side:
    """An arm's runs on the same items in the same order, each as numerators and denominators, (items, metrics)."""

    runs: Sequence[tuple[Array, Array]]
    trained: bool = True


@dataclass(frozen=True)
class Estimate:
    """A statistic and the parts of its variance.

    Attributes:
        parts: (variance, degrees of freedom) of each source of chance.
        lacks: why no interval is claimed; "" where one is.
    """

    value: float
    parts: tuple[tuple[float, int], ...]
    lacks: str = ""

    def half_width(self, level: float = 0.05) -> float:
        return math.sqrt(sum(quantile(level, degrees) ** 2 * variance for variance, degrees in self.parts))

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """The 95 % interval; bounds that differ from 0 by less than sums in another order do are 0."""
        if self.lacks:
            return None, None
        half = self.half_width()
        low, high = (round(bound, 12) + 0.0 for bound in (self.value - half, self.value + half))
        return low, high

    @property
    def p_value(self) -> float:
        """Two-sided, of a value of 0: the level at which `half_width` is the value's distance from it."""
        distance = abs(round(self.value, 12))
        if self.lacks or distance == 0:
            return 1.0
        low, high = math.log(SMALLEST), 0.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.half_width(math.exp(middle)) < distance else (middle, high)
        return math.exp(high)


@functools.cache
def quantile(level: float, degrees: int) -> float:
    """Of Student's t, which it leaves out on both sides together with this probability."""
    return 0.0 if level >= 1 else student_t(1 - level / 2, degrees)


def estimates(side: Side, games: Sequence[str], other: Side | None = None) -> list[Estimate]:
    """Each metric's value for one arm, or what it has more than another.

    Args:
        games: of each item; "" stands for a game of its own.
    """
    sides = [side] if other is None else [side, other]
    summed = [[(sums_by_cluster(t, games), sums_by_cluster(b, games)) for t, b in each.runs] for each in sides]
    count = np.min([clusters_behind(bottom) for runs in summed for _, bottom in runs], axis=0)
    bear = np.any([bottom != 0 for runs in summed for _, bottom in runs], axis=0)  # games with something to count
    values = [np.stack([ratios(top, bottom) for top, bottom in runs]) for runs in summed]  # (seeds, metrics)
    without = [np.mean([_without_each(top, bottom) for top, bottom in runs], axis=0) for runs in summed]
    whole = [of_runs.mean(axis=0) for of_runs in values]
    difference, left = (each[0] if other is None else each[0] - each[1] for each in (whole, without))
    with np.errstate(invalid="ignore", divide="ignore"):
        of_games = np.where(bear, (left - difference) ** 2, 0.0).sum(axis=0) * (1 - 1 / bear.sum(axis=0))
    trained = [of_runs for each, of_runs in zip(sides, values, strict=True) if each.trained]
    found = []
    for i, value in enumerate(difference):
        lacks = "too few games" if count[i] < MIN_CLUSTERS else ""
        lacks = lacks or ("one seed" if any(len(of_runs) < 2 for of_runs in trained) else "")
        parts = [] if lacks else [(float(of_games[i]), int(count[i]) - 1)]
        parts += [(float(r[:, i].var(ddof=1) / len(r)), len(r) - 1) for r in trained if not lacks]
        found.append(Estimate(float(value), tuple(parts), lacks))
    return found


def _without_each(top: Array, bottom: Array) -> Array:
    """The ratios of all games but one, (games, metrics)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (top.sum(axis=0) - top) / (bottom.sum(axis=0) - bottom)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down method (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t for whole degrees of freedom, of a probability of 0.5 or more.

    Up to 100 degrees from the distribution function in closed form (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), by
    bisection; from there by its expansion about the normal quantile (26.7.5), by then right to five digits.
    """
    if degrees <= 100:
        low, high = 0.0, math.pi / 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _within(middle, degrees) < 2 * probability - 1 else (low, middle)
        return math.sqrt(degrees) * math.tan(low)
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _within(angle: float, degrees: int) -> float:
    """The probability that Student's t lies within +- sqrt(degrees) tan(angle)."""
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for k in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    if degrees % 2:
        return (angle + math.sin(angle) * total) * 2 / math.pi
    return math.sin(angle) * total
