"""Confidence intervals for held-out metrics: Wilson, and percentile bootstrap over items.

Every metric here is a ratio of sums over items, sum(numerator) / sum(denominator): a mean has denominator 1, recall
counts the true positives over the positives, F1 is 2 TP over (predicted + actual). So one resampler serves them all,
and a comparison of two models resamples *items*, keeping each item's two results together.

All intervals are two-sided, at 95 %. They treat items as independent draws from the positions the split was made from;
where items come from games, whole games are what is drawn (`sums_by_cluster`), for positions of one game are alike.

How far an interval can be trusted hangs on the number of clusters: of games, or of items where none share one. Of two
models without any difference, resampling calls 14 of 100 comparisons over five games significant, and nearly all over
one. So below `MIN_CLUSTERS` there is no interval, and nothing is significant; up to `FEW_CLUSTERS` resampling's
quantiles are moved outwards, to those of Student's t (`percentile_interval`).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bounds = tuple[float, float] | tuple[None, None]  # of an interval; None where none is claimed

RESAMPLES = 10_000
MIN_CLUSTERS = 10
FEW_CLUSTERS = 30
# The 0.975 quantiles of Student's t with 9, 10, ... and 29 degrees of freedom.
STUDENT = (
    *(2.262157, 2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024),
    *(2.085963, 2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230),
)
_CHUNK_ELEMENTS = 4_000_000  # resampled counts held at once; 32 MB


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, without continuity correction (Wilson 1927; Newcombe 1998, method 3).

    Returns:
        (low, high), both in [0, 1].
    """
    z = NormalDist().inv_cdf(0.975)
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The bound next to 0 or 1 successes is exactly 0 or 1; rounding would leave 1e-18 there.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == trials else center + half)


def ratios(numerators: Array, denominators: Array) -> Array:
    """Sum(numerator) / sum(denominator) along the first axis; NaN where the denominators sum to 0."""
    return _divide(numerators.sum(axis=0), denominators.sum(axis=0))


def bootstrap_ratios(
    numerators: Array, denominators: Array, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Resample items with replacement and compute every ratio again.

    Args:
        numerators, denominators: (items, k), one column per ratio. The k ratios share each resample of the items,
            which is what pairs them.

    Returns:
        (resamples, k); NaN where a resample's denominators sum to 0.
    """
    items = len(numerators)
    rng = np.random.default_rng(seed)
    columns = np.hstack([numerators, denominators])
    chunk = max(1, _CHUNK_ELEMENTS // items)
    sums = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(0, items, size=(rows, items)) + np.arange(rows)[:, None] * items
        counts = np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items)
        sums.append(counts.astype(np.float64) @ columns)
    top, bottom = np.hsplit(np.concatenate(sums), 2)
    return _divide(top, bottom)


def sums_by_cluster(terms: Array, labels: Sequence[str]) -> Array:
    """Sum the terms (items, k) of each cluster; an item with an empty label is a cluster of its own.

    Resampling the result resamples whole clusters, and leaves every ratio of sums as it is (Cameron, Gelbach and
    Miller 2008, pairs cluster bootstrap).

    Returns:
        (clusters, k), in the order in which the clusters first occur.
    """
    numbers: dict[object, int] = {}
    places = [numbers.setdefault(label or i, len(numbers)) for i, label in enumerate(labels)]
    sums = np.zeros((len(numbers), terms.shape[1]))
    np.add.at(sums, places, terms)
    return sums


def clusters_behind(denominators: Array) -> NDArray[np.int64]:
    """How many clusters each ratio rests on: those in which its denominator is not 0.

    Recall of five mates among 500 games rests on five games, however many others are drawn with them.

    Args:
        denominators: (clusters, k), as of `sums_by_cluster`.
    """
    return np.count_nonzero(denominators, axis=0)


def percentile_interval(draws: Array, clusters: int) -> Bounds:
    """95 % percentile bootstrap interval (Efron 1979) of one statistic's draws, those that are NaN left out.

    Percentile rather than BCa: always defined, also when every item agrees, and at the hundreds of items of a
    held-out split the two differ in the fourth digit. Over few clusters it is too narrow: its spread is sqrt((n-1)/n)
    of the truth, and the truth is estimated. Up to `FEW_CLUSTERS` it is the *expanded* percentile interval (Hesterberg
    2015, section 4.4): the normal quantile z becomes sqrt(n/(n-1)) times that of Student's t with n - 1 degrees of
    freedom.

    Args:
        clusters: how many the statistic rests on (`clusters_behind`).

    Returns:
        (None, None) below `MIN_CLUSTERS`, or where every draw is NaN.
    """
    draws = draws[~np.isnan(draws)]
    if clusters < MIN_CLUSTERS or len(draws) == 0:
        return None, None
    tail = 0.025
    if clusters <= FEW_CLUSTERS:
        tail = NormalDist().cdf(-math.sqrt(clusters / (clusters - 1)) * STUDENT[clusters - MIN_CLUSTERS])
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _divide(top: Array, bottom: Array) -> Array:
    return np.divide(top, bottom, out=np.full_like(top, np.nan, dtype=np.float64), where=bottom != 0)
