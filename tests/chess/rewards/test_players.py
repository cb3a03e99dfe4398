"""Players whose values are off by noise, on every dev row: who plays better is paid more, and a list that no chess
player would write is paid less than his. Differences are paired and three errors from 0.
"""

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.players import (
    FORMS,
    Values,
    any_legal,
    best,
    best_and_random,
    best_and_worst,
    by_place,
    earned,
    own,
    rows,
    spread,
    three_and_two_worst,
    unlike,
    worst,
    wrong,
    zeros,
)
from rookworld_trl.chess.policy import format_completion
from rookworld_trl.chess.rewards import score_environment, score_policy


def surely_more(high: Values, low: Values) -> bool:
    difference = high - low
    return float(difference.mean()) > 3 * float(difference.std()) / len(difference) ** 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of_position", [0.0, 20.0, 60.0])
@pytest.mark.parametrize("noise", [20.0, 40.0, 60.0])
def test_a_players_own_best_five_beat_every_other_list(noise: float, of_position: float, form: str) -> None:
    right = earned(best, noise, of_position)[form]
    for other in (spread, best_and_worst, three_and_two_worst, best_and_random, any_legal, worst):
        assert surely_more(right, earned(other, noise, of_position)[form]), other.__name__


@pytest.mark.parametrize("form", FORMS)
def test_equal_moves_are_no_list_to_write(form: str) -> None:
    """The five moves closest in value, true evals: a constant is their truth, and pays nothing."""

    def closest(order: Values, count: int, rng: np.random.Generator) -> list[int]:
        value = values[order]
        start = min(range(len(order) - count + 1), key=lambda i: value[i] - value[i + count - 1])
        return list(order[start : start + count])

    found = []
    for row in rows("policy"):
        values = np.array(row["legal_cp"])
        listed = closest(np.argsort(-values, kind="stable"), min(5, len(values)), np.random.default_rng(0))
        moves, true = [row["legal_moves"][i] for i in listed], values[listed]
        text = format_completion(moves, own(true, true), moves[0])
        found.append(getattr(score_policy(text, row["legal_moves"], row["legal_cp"]), form))
    assert np.mean(found) < 0.3
    assert surely_more(earned(best, 60.0, 60.0)[form], np.array(found))


@pytest.mark.parametrize("form", FORMS)
def test_reward_rises_with_strength(form: str) -> None:
    players = [earned(best, noise)[form] for noise in (0, 10, 20, 40, 60, 100, 200, 400)]
    players += [earned(any_legal, 0.0, writes=wrong)[form], earned(worst, 0.0, writes=wrong)[form]]
    assert players[0].min() == 1.0
    assert all(surely_more(stronger, weaker) for stronger, weaker in pairwise(players))


@pytest.mark.parametrize("form", FORMS)
def test_a_random_legal_mover_is_at_the_bottom_of_the_legal_levels(form: str) -> None:
    for writes in (wrong, zeros, by_place):
        reward = earned(any_legal, writes=writes)[form]
        assert reward.mean() + 3 * reward.std() / len(reward) ** 0.5 < 0.2
        assert (reward > 0.2).mean() < 0.35  # a quarter finds a good move, or plays where nothing is at stake


def test_a_board_that_is_half_moved_or_mixed_earns_nothing_above_the_bottom() -> None:
    found: dict[str, list[float]] = {}
    for name, row, answer in unlike():
        score = score_environment(row["prompt"], answer, row["target"])
        found.setdefault(name, []).append(max(score.reward, score.continuous))
    assert min(map(len, found.values())) > 200
    mixed = found.pop("ranks of the truth and of another board")  # may hold the whole move, and little else
    assert len(found) == 4
    assert max(max(each) for each in found.values()) <= 0.2
    assert np.mean(mixed) <= 0.2 + 1e-9
