"""Two ladders in one fit: by hand, against a bootstrap of its own, and at its rate of false alarms."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rookworld_trl.chess.ladder import Ladder, ladder_of
from rookworld_trl.chess.play import GameRecord
from rookworld_trl.measuring.comparison import Comparison
from rookworld_trl.measuring.elo import rate, resampled
from rookworld_trl.measuring.intervals import percentile_interval
from rookworld_trl.measuring.tables import comparison_table

RESULTS: dict[float, Any] = {1.0: "1-0", 0.5: "1/2-1/2", 0.0: "0-1"}


def games_of(one: str, two: str, points: list[float], moves: str = "") -> list[GameRecord]:
    """Games of these points of the first, each from an opening of its own: kings, and the opening's number."""
    return [
        GameRecord(f"8/8/8/8/8/8/K6k/8 w - - {i} 1", tuple(moves.split()), RESULTS[p], "checkmate", one, two)
        for i, p in enumerate(points)
    ]


def ladder(*games: list[GameRecord], model: str = "m") -> Ladder:
    return ladder_of({}, model, "random", list(itertools.chain(*games)))


def changes(before: Ladder, after: Ladder) -> list[Comparison]:
    return after.further(after.earlier(json.loads(json.dumps(before.to_dict()))))


def test_a_difference_by_hand() -> None:
    """7.5 and 2.5 of 10 points against the random mover, the models of one name.

    Each has half a virtual draw of its own and a quarter of the random mover's: 7.875 of 10.75, and 2.875.
    """
    better, worse = [1.0] * 7 + [0.5] + [0.0] * 2, [0.0] * 7 + [0.5] + [1.0] * 2
    rows = changes(ladder(games_of("m", "random", worse)), ladder(games_of("random", "m", worse)))
    assert [row["metric"] for row in rows] == ["elo_strict", "elo_lenient"]
    odds = 400 * math.log10(7.875 / 2.875)
    for row in rows:
        assert (row["before"], row["after"]) == (pytest.approx(-odds), pytest.approx(odds))
        assert (row["difference"], row["items"], row["clusters"]) == (pytest.approx(2 * odds), 10, 10)
    fallen = changes(ladder(games_of("m", "random", better)), ladder(games_of("n", "random", worse), model="n"))
    assert fallen[0]["difference"] == pytest.approx(-2 * odds)


def test_an_anchor_has_one_rating_for_both() -> None:
    """A strong anchor draws with the model; only who else it met differs. By fits of their own the model rose by 400.

    On both ladders the model has half of the points against x, who met the random mover in other games each time: won
    all 30 in one, 15 in the other. Strength against x is all that is known of the model, and it is the same.
    """
    half = [0.5] * 30
    before = ladder(games_of("m", "x", half), games_of("x", "random", half))
    after = ladder(games_of("m", "x", half), games_of("x", "random", [1.0] * 30, "e2e4"))
    alone = [each.ratings("lenient")["m"].elo for each in (before, after)]
    assert alone[1] - alone[0] > 400
    (row, _) = changes(before, after)
    assert row["difference"] == pytest.approx(0)
    assert row["before"] == pytest.approx(row["after"])
    # x against the random mover: 45 of 60, and a quarter of the pairing's draws: 60 of x's 120 games, all of random's.
    assert row["before"] == pytest.approx(400 * math.log10((45 + 0.375) / (15 + 0.375)), abs=0.5)


def test_the_anchors_games_count_once_where_they_are_the_same() -> None:
    """One seed plays the same anchors' games on both ladders: they are no news."""
    rng = random.Random(0)
    points = [[rng.choice([0.0, 0.5, 1.0]) for _ in range(20)] for _ in range(3)]
    anchors = games_of("x", "random", points[2])
    before, after = (ladder(games_of("m", "x", own), games_of("random", "m", own), anchors) for own in points[:2])
    once = [(f"m{n}", "x", p) for n in (0, 1) for p in points[n]] + [
        ("random", f"m{n}", p) for n in (0, 1) for p in points[n]
    ]
    expected = rate([*once, *(("x", "random", p) for p in points[2])], "random")
    (row, _) = changes(before, after)
    assert (row["before"], row["after"]) == (pytest.approx(expected["m0"].elo), pytest.approx(expected["m1"].elo))


def test_the_interval_against_a_bootstrap_in_closed_form() -> None:
    """Against one anchor a rating is the odds of the points; both models' games of an opening are drawn together."""
    rng = random.Random(1)
    old, new = ([rng.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(40)] for _ in range(2))
    new = [max(a, b) for a, b in zip(old, new, strict=True)]
    (row, _) = changes(ladder(games_of("m", "random", old)), ladder(games_of("m", "random", new)))

    def elo(points: list[float], drawn: list[int]) -> float:
        won = sum(points[i] for i in drawn) + 0.375
        return 400 * math.log10(won / (40.75 - won))

    differences = []
    for _ in range(20_000):
        drawn = rng.choices(range(40), k=40)
        differences.append(elo(new, drawn) - elo(old, drawn))
    assert row["ci_low"] is not None
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=6)
    assert row["significant"] == (row["ci_low"] > 0)


def test_few_openings_and_lost_games_have_no_verdict() -> None:
    mixed = [0.0, 1.0] * 5
    (few, _) = changes(ladder(games_of("m", "random", mixed[:9])), ladder(games_of("m", "random", [1.0] * 8 + [0.0])))
    assert (few["clusters"], few["ci_low"], few["significant"]) == (9, None, False)
    assert "too few (9)" in comparison_table([few])
    (lost, _) = changes(ladder(games_of("m", "random", [0.0] * 20)), ladder(games_of("m", "random", mixed * 2)))
    assert (lost["clusters"], lost["ci_low"], lost["significant"]) == (20, None, False), "there is a bound alone"
    assert "too few" not in comparison_table([lost])


@pytest.mark.parametrize("openings", [10, 25])
def test_equal_models_are_rarely_told_apart(openings: int) -> None:
    """Two anchors, mirrored openings, each with luck of its own; 200 pairs of ladders."""
    rng, significant = random.Random(openings), 0

    def played(one: str, two: str, elo: float, luck: list[float], moves: str) -> Iterator[GameRecord]:
        for number, of_opening in enumerate(luck):
            for white, black, sign in ((one, two, 1), (two, one, -1)):
                chance = 1 / (1 + 10 ** (-(sign * elo + of_opening) / 400))
                result = "1-0" if rng.random() < chance else "0-1"
                yield GameRecord(str(number), (moves,), result, "checkmate", white, black)  # type: ignore[arg-type]

    for trial in range(200):
        luck = [rng.gauss(0, 150) for _ in range(openings)]
        anchors = list(played("x", "random", 300, luck, "anchors"))
        both = [
            ladder(list(played("m", "random", 100, luck, name)), list(played("m", "x", -200, luck, name)), anchors)
            for name in "ab"
        ]
        results = [
            (white, black, game.white_score or 0.0, game.fen)
            for number, each in enumerate(both)
            for game in each.games
            for white, black in [[f"m{number}" if name == "m" else name for name in (game.white, game.black)]]
            if number == 0 or "m1" in (white, black)
        ]
        drawn = resampled([r[:3] for r in results], [r[3] for r in results], "random", ("m0", "m1"), 1000, trial)
        spread = drawn[:, 1] - drawn[:, 0]
        assert not np.isnan(spread).any()
        low, high = percentile_interval(spread, openings)
        assert low is not None
        assert high is not None
        significant += low > 0 or high < 0
    assert 0.01 <= significant / 200 <= 0.08
