"""Intervals and p-values of the evidence: by hand, in simulation for few seeds and games, and in another order."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence import report, store
from benchmarks.evidence.statistics import Side, estimates, holm, student_t

TRIALS = 2_000  # columns of the arrays, so that one call estimates them all


def column(*values: float) -> tuple[Any, Any]:
    """A run whose items, each a game of its own, score these."""
    return np.array(values)[:, None], np.ones((len(values), 1))


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, each no smaller than the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])


def test_what_is_not_trained_is_compared_as_by_the_paired_t_test() -> None:
    """Differences 1 to 12: mean 6.5, variance 13, standard error sqrt(13 / 12), and 2.201 is t's quantile of 11."""
    one, other = (Side([column(*(k * n for n in range(1, 13)))], trained=False) for k in (3, 2))
    (found,) = estimates(one, [""] * 12, other)
    half = 2.20099 * math.sqrt(13 / 12)
    assert found.value == pytest.approx(6.5)
    assert found.interval == pytest.approx((6.5 - half, 6.5 + half), abs=1e-4)
    assert found.p_value == pytest.approx(
        6.304e-5, rel=1e-3
    )  # twice the density of t_11 beyond 6.2450, by Simpson's rule


def test_two_seeds_have_students_quantile_of_one_degree() -> None:
    """All items alike, so that seeds alone are the spread: 0.6 and 0.8, their mean's standard error is 0.1."""
    (found,) = estimates(Side([column(*[mean] * 20) for mean in (0.6, 0.8)]), [""] * 20)
    assert found.value == pytest.approx(0.7)
    assert found.interval == pytest.approx((0.7 - 12.7062 * 0.1, 0.7 + 12.7062 * 0.1), abs=1e-4)
    assert found.p_value == pytest.approx(2 * (0.5 - math.atan(7) / math.pi))  # Cauchy's distribution


def test_games_are_the_unit_and_a_part_of_their_own() -> None:
    """Twelve games of two equal items count as twelve items, beside the part of two runs 0.2 apart everywhere."""
    values = [float(n) for n in range(12) for _ in range(2)]
    games = [str(n) for n in range(12) for _ in range(2)]
    (found,) = estimates(Side([column(*(v + s for v in values)) for s in (0.0, 0.2)]), games)
    variances = sorted(found.parts, key=lambda part: part[1])
    assert [degrees for _, degrees in variances] == [1, 11]
    assert [variance for variance, _ in variances] == pytest.approx([0.01, 13 / 12])


def test_of_few_games_or_one_seed_nothing_is_claimed() -> None:
    nine, ten = ([column(*np.arange(n, dtype=float) + s) for s in (5, 6)] for n in (9, 10))
    for side, count, lacks in ((Side(nine), 9, "too few games"), (Side(ten[:1]), 10, "one seed")):
        (found,) = estimates(side, [""] * count)
        assert (found.interval, found.p_value, found.lacks) == ((None, None), 1.0, lacks)
    assert estimates(Side(ten), [""] * 10)[0].lacks == ""
    assert estimates(Side(ten[:1], trained=False), [""] * 10)[0].lacks == ""
    assert "(one seed)" in report.shown({"lacks": "one seed", "ci_low": None, "ci_high": None})


def simulated(rng: Any, seeds: int, games: int, kind: str, spread: tuple[float, float, float], rival: bool) -> Any:
    """An arm's and its rival's runs, one to five items a game, in `TRIALS` columns, and their true difference.

    Items hang on the game, the game in this arm, the seed, and both; scores are that, or whether it is above 0.
    """
    labels = [str(game) for game in range(games) for _ in range(rng.integers(1, 6))]
    place = np.array([int(label) for label in labels])
    of_game, of_seed, of_both = spread
    shared = rng.normal(0, of_game, (games, TRIALS))[place]

    def runs(count: int, mean: float, trained: bool) -> list[tuple[Any, Any]]:
        own = rng.normal(0, of_game / 2, (games, TRIALS))[place]
        found = []
        for _ in range(count):
            score = mean + shared + own + rng.normal(0, of_both, (games, TRIALS))[place]
            score += rng.normal(0, of_both, score.shape) + rng.normal(0, of_seed, TRIALS) * trained
            found.append((score if kind == "score" else (score > 0).astype(float), np.ones_like(score)))
        return found

    def expected(mean: float, trained: bool) -> float:
        deviation = math.sqrt(1.25 * of_game**2 + 2 * of_both**2 + of_seed**2 * trained)
        return mean if kind == "score" else (1 + math.erf(mean / deviation / math.sqrt(2))) / 2

    sides = Side(runs(seeds, 0.5, True)), Side(runs(seeds if rival else 1, 0.3, rival), trained=rival)
    return sides, labels, expected(0.5, True) - expected(0.3, rival)


@pytest.mark.parametrize("games", [10, 20, 60])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_95_percent_intervals_hold_in_93_percent_of_cases_or_more(seeds: int, games: int) -> None:
    """Seeds or games or what befalls an item by a seed's chance as the larger part; against the base, and a rival."""
    rng = np.random.default_rng([seeds, games])
    for kind, spread in (
        ("score", (1, 1, 1)),
        ("score", (0.3, 1, 0.3)),
        ("share", (1, 0.3, 1)),
        ("share", (1, 0, 0.5)),
    ):
        for rival in (False, True):
            (one, other), labels, true = simulated(rng, seeds, games, kind, spread, rival)
            found = [each.interval for each in estimates(one, labels, other)]
            assert None not in {low for low, _ in found}
            held = np.mean([low <= true <= high for low, high in found if low is not None and high is not None])
            assert held >= 0.93, (kind, spread, rival, held)


def test_why_the_parts_have_quantiles_of_their_own() -> None:
    """Two seeds against the base, with Welch and Satterthwaite's degrees of freedom for both parts: too narrow."""
    rng = np.random.default_rng(1)
    (one, other), labels, true = simulated(rng, 2, 60, "score", (1, 0.3, 0.3), rival=False)
    found = estimates(one, labels, other)
    held = []
    for each in found:
        total = sum(variance for variance, _ in each.parts)
        degrees = total**2 / sum(variance**2 / n for variance, n in each.parts)
        held.append(abs(each.value - true) <= quantile_of(degrees) * math.sqrt(total))
    assert np.mean(held) < 0.92
    assert np.mean([low <= true <= high for low, high in (each.interval for each in found)]) >= 0.93  # type: ignore[operator]


def quantile_of(degrees: float) -> float:
    """Student's 97.5 % quantile, linear in 1 / degrees between whole ones, of a table."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042}
    inverse = sorted((1 / n, value) for n, value in ({**table, 1e9: 1.960}).items())
    return float(np.interp(1 / degrees, *zip(*inverse, strict=True)))


def test_six_random_seeds_give_the_same_verdicts() -> None:
    """Nothing is drawn, so a seed can only change an order: of the items, of the runs, or the global generator."""
    stored: dict[str, list[store.Result]] = {}
    for name in store.names("test"):
        found = store.read("test", name)
        if (found.facts["arm"], found.facts["minutes"]) in {
            ("exact", 3.0),
            ("gold", 3.0),
            ("sampled", 3.0),
            ("base", 0),
        }:
            stored.setdefault(found.facts["arm"], []).append(found)
    verdicts = set()
    for seed in range(6):
        np.random.seed(seed)
        rng = np.random.default_rng(seed)
        rows = []
        for task in ("policy", "environment"):
            order = rng.permutation(len(stored["base"][0].keys[task]))
            games = [stored["base"][0].games[task][i] for i in order]
            side = {
                arm: Side(
                    [tuple(term[order] for term in runs[i].terms[task, "greedy"]) for i in rng.permutation(len(runs))],
                    trained=arm != "base",
                )
                for arm, runs in stored.items()
            }
            for one, other in (("exact", "base"), ("gold", "base"), ("sampled", "base"), ("exact", "gold")):
                rows += estimates(side[one], games, side[other])
        adjusted = holm([row.p_value for row in rows])
        verdicts.add(tuple(p < 0.05 for p in adjusted))
    assert len(verdicts) == 1
    assert 0 < sum(next(iter(verdicts))) < len(rows), "some win, some do not"


@pytest.mark.parametrize(
    ("degrees", "quantiles"),
    [(1, (12.7062, 636.619)), (2, (4.30265, 31.5991)), (4, (2.77645, 8.61030)), (9, (2.26216, 4.78091)),
     (30, (2.04227, 3.64596)), (120, (1.97993, 3.37345))],
)  # fmt: skip
def test_students_quantiles_are_those_of_the_table(degrees: int, quantiles: tuple[float, float]) -> None:
    """Of 0.975 and 0.9995, as printed in tables of t."""
    assert (student_t(0.975, degrees), student_t(0.9995, degrees)) == pytest.approx(quantiles, rel=1e-5)
