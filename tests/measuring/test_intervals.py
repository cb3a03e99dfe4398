"""Intervals against published values, exact enumeration and coverage on data of known truth."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from rookworld_trl.measuring.intervals import (
    bootstrap_ratios,
    clusters_behind,
    percentile_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3 (score interval).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_newcombes_table(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(10, 10)[0] == pytest.approx(1 - wilson(0, 10)[1])


def test_bootstrap_matches_full_enumeration() -> None:
    """All 4^4 resamples of four items are enumerated; the drawn distribution must agree with theirs."""
    numerators, denominators = [1.0, 0.0, 2.0, 1.0], [1.0, 2.0, 3.0, 0.0]
    exact = [
        sum(numerators[i] for i in pick) / sum(denominators[i] for i in pick) if pick != (3, 3, 3, 3) else math.nan
        for pick in itertools.product(range(4), repeat=4)
    ]
    draws = bootstrap_ratios(np.array([numerators]).T, np.array([denominators]).T, resamples=40_000, seed=1)[:, 0]
    assert np.isnan(draws).mean() == pytest.approx(1 / 256, abs=0.002)
    for threshold in (0.2, 0.34, 0.5, 0.8, 1.1):
        assert np.nanmean(draws <= threshold) == pytest.approx(np.mean(np.array(exact) <= threshold), abs=0.01)


def test_chunks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(40, 1))
    whole = bootstrap_ratios(values, np.ones_like(values), resamples=50, seed=3)
    monkeypatch.setattr("rookworld_trl.measuring.intervals._CHUNK_ELEMENTS", 300)  # 7 resamples at a time
    np.testing.assert_allclose(bootstrap_ratios(values, np.ones_like(values), resamples=50, seed=3), whole, rtol=1e-9)


def test_a_bootstrap_is_seeded_and_uses_the_pairs() -> None:
    """A difference of two means and its interval, as `compare` takes them from one bootstrap of both columns."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=400)
    after = before + 0.05 + rng.normal(scale=0.05, size=400)
    columns = np.stack([before, after], axis=1)
    draws = bootstrap_ratios(columns, np.ones((400, 2)), seed=7)
    np.testing.assert_array_equal(draws, bootstrap_ratios(columns, np.ones((400, 2)), seed=7))
    # For a mean the bootstrap's spread is s/sqrt(n); unpaired it would be 28 times as wide and hide the gain.
    difference, spread = (after - before).mean(), 1.96 * (after - before).std() / 20
    expected = (difference - spread, difference + spread)
    assert percentile_interval(draws[:, 1] - draws[:, 0], 400) == pytest.approx(expected, abs=0.1 * spread)


def test_percentile_interval_of_known_draws() -> None:
    assert percentile_interval(np.arange(0, 1001, dtype=float), 31) == pytest.approx((25.0, 975.0))
    assert percentile_interval(np.array([math.nan, 2.0, 2.0]), 31) == (2.0, 2.0)
    assert percentile_interval(np.array([math.nan]), 31) == (None, None)


@pytest.mark.parametrize(
    ("clusters", "half"),
    # Student's t from tables: 2.2622 (9 degrees of freedom), 2.2010 (11), 2.0930 (19), 2.0452 (29).
    [
        (10, 2.262157 * math.sqrt(10 / 9)),
        (12, 2.200985 * math.sqrt(12 / 11)),
        (20, 2.093024 * math.sqrt(20 / 19)),
        (30, 2.045230 * math.sqrt(30 / 29)),
        (31, 1.959964),
        (400, 1.959964),
    ],
)
def test_over_few_clusters_the_quantiles_are_students(clusters: int, half: float) -> None:
    """Of draws from the standard normal distribution: a hundred thousand of its quantiles."""
    draws = np.array([NormalDist().inv_cdf((i + 0.5) / 100_000) for i in range(100_000)])
    assert percentile_interval(draws, clusters) == pytest.approx((-half, half), abs=2e-3)


def test_below_ten_clusters_there_is_no_interval() -> None:
    draws = np.arange(1001, dtype=float)
    assert [percentile_interval(draws, n) == (None, None) for n in (0, 1, 9, 10)] == [True, True, True, False]


def test_a_ratio_rests_on_the_clusters_that_have_its_denominator() -> None:
    assert clusters_behind(np.array([[1.0, 0.0], [2.0, 0.0], [0.5, 3.0]])).tolist() == [3, 1]
