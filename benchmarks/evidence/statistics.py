"""Intervals over seeds and items at once, and what counts as a win when many comparisons are made."""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rookworld_trl.measuring.intervals import Array, clusters_behind, sums_by_cluster

RESAMPLES = 10_000


def draws(sides: Sequence[Sequence[tuple[Array, Array]]], games: Sequence[str], seed: int = 0) -> Array:
    """Hierarchical bootstrap: each draw takes games with replacement, the same for all sides, and seeds of each side.

    A side's statistic is the mean over its drawn seeds of sum(numerator) / sum(denominator) over the drawn games.
    Both sources of chance are in the spread: which seeds were run, and which positions the split holds. Games and the
    seeds of each side are drawn from streams of their own, a side's named by its numbers: its interval is the same
    in whatever company it is drawn.

    Args:
        sides: for each arm its seeds' numerators and denominators, each (items, metrics), of the same items in the
            same order.
        games: of each item; "" stands for a game of its own.

    Returns:
        (resamples, sides, metrics).
    """
    rng = np.random.default_rng(seed)
    streams = [np.random.default_rng([seed, zlib.crc32(side[0][0].astype(np.float32).tobytes())]) for side in sides]
    grouped = [[(sums_by_cluster(t, games), sums_by_cluster(b, games)) for t, b in side] for side in sides]
    clusters, metrics = grouped[0][0][0].shape
    result = np.empty((RESAMPLES, len(sides), metrics))
    step = max(1, 4_000_000 // clusters)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        picks = rng.integers(0, clusters, size=(rows, clusters)) + np.arange(rows)[:, None] * clusters
        counts = np.bincount(picks.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)
        for number, side in enumerate(grouped):
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = np.stack(
                    [(counts @ top) / (counts @ bottom) for top, bottom in side]
                )  # (seeds, rows, metrics)
            chosen = streams[number].integers(0, len(side), size=(rows, len(side))).T
            result[start : start + rows, number] = ratios[chosen, np.arange(rows)].mean(axis=0)
    return result


def clusters(sides: Sequence[Sequence[tuple[Array, Array]]], games: Sequence[str]) -> NDArray[np.int64]:
    """How many games each metric rests on, (metrics,): the fewest of any side's seed. The arguments are `draws`'s."""
    return np.min([clusters_behind(sums_by_cluster(bottom, games)) for side in sides for _, bottom in side], axis=0)


def p_value(differences: Array) -> float:
    """Two-sided bootstrap p-value of a difference of 0, at least 1 / (draws + 1)."""
    found = differences[~np.isnan(differences)]
    tail = min((found <= 0).sum(), (found >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(found) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down method (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
