"""Elo from points by hand, by another algorithm, and in simulated tournaments whose ratings are known."""

import math
import random

import pytest

from rookworld_trl.measuring.elo import rate

Z = 1.959964


def results(first: str, second: str, wins: int, draws: int, losses: int) -> list[tuple[str, str, float]]:
    return [(first, second, 1.0)] * wins + [(first, second, 0.5)] * draws + [(first, second, 0.0)] * losses


def test_two_players_by_hand() -> None:
    """7.5 of 10 points and the virtual draw: 8 of 11, so odds of 8 to 3; information 11 x 8/11 x 3/11 = 24/11."""
    rated = rate(results("a", "b", 7, 1, 2), "b")
    assert list(rated) == ["a", "b"]
    assert rated["a"].elo == pytest.approx(400 * math.log10(8 / 3))  # 170.4
    half = Z * 400 / math.log(10) * math.sqrt(11 / 24)  # 230.5
    assert (rated["a"].ci_low, rated["a"].ci_high) == (
        pytest.approx(rated["a"].elo - half, abs=1e-3),
        pytest.approx(rated["a"].elo + half, abs=1e-3),
    )
    assert (rated["a"].points, rated["a"].games) == (7.5, 10)
    assert (rated["b"].elo, rated["b"].ci_low, rated["b"].ci_high, rated["b"].points) == (0, 0, 0, 2.5)


@pytest.mark.parametrize("lost", [True, False])
def test_who_lost_or_won_every_game_has_a_bound(lost: bool) -> None:
    """0 of 10 points and the virtual draw: 0.5 of 11, odds of 1 to 21; information 11 x 1/22 x 21/22."""
    rated = rate(results("a", "b", 0, 0, 10) if lost else results("a", "b", 10, 0, 0), "b")["a"]
    sign = -1 if lost else 1
    half = Z * 400 / math.log(10) * math.sqrt(44 / 21)
    assert rated.elo == pytest.approx(sign * 400 * math.log10(21))  # 528.9
    open_end, bound = (rated.ci_low, rated.ci_high) if lost else (rated.ci_high, rated.ci_low)
    assert open_end is None
    assert bound == pytest.approx(rated.elo - sign * half, abs=1e-3)


@pytest.mark.parametrize(
    ("games", "virtual"),
    [
        # Every player plays 8: a draw each, spread as its games are.
        ({"ab": 4, "bc": 4, "ac": 4}, {"ab": 1 / 2, "bc": 1 / 2, "ac": 1 / 2}),
        ({"ab": 6, "cd": 6, "ac": 2, "bd": 2}, {"ab": 3 / 4, "cd": 3 / 4, "ac": 1 / 4, "bd": 1 / 4}),
        # c plays 14: half a draw of the other's is there in each pairing, and of c's half 10/14 and 4/14.
        ({"ac": 10, "bc": 4}, {"ac": 1 / 2 + 5 / 14, "bc": 1 / 2 + 2 / 14}),
    ],
)
def test_the_prior_by_hand_on_even_and_uneven_schedules(games: dict[str, int], virtual: dict[str, float]) -> None:
    """Three quarters of each pairing's points go to the first: the likelihood's slope is 0 with these virtual draws."""
    played = [game for pair, n in games.items() for game in results(*pair, n // 2, n // 2, 0)]
    rated = {name: rating.elo for name, rating in rate(played, "c").items()}
    assert sum(virtual.values()) == pytest.approx(len(rated) / 2)  # half a draw each
    for name in rated:
        slope = 0.0
        for pair, n in games.items():
            if name in pair:
                chance = 1 / (1 + 10 ** ((rated[pair[1]] - rated[pair[0]]) / 400))
                surplus = 0.75 * n + virtual[pair] / 2 - (n + virtual[pair]) * chance
                slope += surplus if name == pair[0] else -surplus
        assert slope == pytest.approx(0, abs=1e-6)
    if "bc" in games and "ab" not in games:
        assert rated["a"] == pytest.approx(400 * math.log10((7.5 + 3 / 7) / (2.5 + 3 / 7)))


def test_known_ratings_are_found_and_held_by_their_intervals() -> None:
    """Without draws the intervals hold what they say; 100 tournaments, 300 intervals."""
    rng, truth = random.Random(0), {"a": 0.0, "b": 100.0, "c": 400.0, "d": 650.0}
    held, errors = 0, dict.fromkeys("bcd", 0.0)
    for _ in range(100):
        games = [
            (one, two, float(rng.random() < 1 / (1 + 10 ** ((truth[two] - truth[one]) / 400))))
            for one in truth
            for two in truth
            if one < two
            for _ in range(60)
        ]
        rated = rate(games, "a")
        for name in errors:
            low, high = rated[name].ci_low, rated[name].ci_high
            held += low is not None and high is not None and low <= truth[name] <= high
            errors[name] += (rated[name].elo - truth[name]) / 100
    assert 0.92 <= held / 300 <= 0.99
    assert all(abs(error) < 15 for error in errors.values())


def test_impossible_requests() -> None:
    with pytest.raises(ValueError, match="'c' has no game"):
        rate(results("a", "b", 1, 0, 0), "c")
