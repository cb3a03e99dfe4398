"""Players whose values are off by noise, on every dev row: who plays better is paid more, and a list that no chess
player would write is paid less than his. Differences are paired and three errors from 0.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import chess
import numpy as np
import pytest

from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.policy import MATE_CP, format_completion, format_eval
from rookworld_trl.chess.rewards import score_environment, score_policy

FORMS = ("continuous", "reward")
Values = np.ndarray[Any, Any]
Chooses = Callable[[Values, int, np.random.Generator], list[int]]  # from what it believes, the candidates, `B:` first
Writes = Callable[[Values, Values], list[str]]  # from what it believes of them and the true values, the evals


@cache
def rows(task: str) -> list[dict[str, Any]]:
    return [row for row in load_shipped("dev") if row["task"] == task]


# --- lists, of moves in the order of what the player believes


def best(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(order[:count])


def spread(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(order[np.linspace(0, len(order) - 1, count).round().astype(int)])


def best_and_worst(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return [order[0], *order[::-1][: count - 1]]


def three_and_two_worst(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    good = max(1, count - 2)
    return [*order[:good], *order[::-1][: count - good]]


def best_and_random(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return [order[0], *rng.permutation(order[1:])[: count - 1]]


def any_legal(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(rng.permutation(order)[:count])


def worst(order: Values, count: int, rng: np.random.Generator) -> list[int]:
    return list(order[::-1][:count])


# --- evals


def own(believed: Values, true: Values) -> list[str]:
    return [format_eval(int(cp)) for cp in believed]


def wrong(believed: Values, true: Values) -> list[str]:
    """One number that no value is: what the moves earn without evals."""
    return ["-55.55"] * len(believed)


def constant(believed: Values, true: Values) -> list[str]:
    """The best one there is, which takes the true values to find."""
    return [format_eval(int(np.sort(true)[len(true) // 2]))] * len(true)


def near_constant(believed: Values, true: Values) -> list[str]:
    return [f"{float(constant(believed, true)[0]) + i / 1000:.3f}" for i in range(len(true))]


def zeros(believed: Values, true: Values) -> list[str]:
    return ["0.0"] * len(true)


def by_place(believed: Values, true: Values) -> list[str]:
    return ["0.5", "0.4", "0.3", "0.2", "0.1"][: len(true)]


@cache
def earned(chooses: Chooses, noise: float = 0.0, of_position: float = 0.0, writes: Writes = own) -> dict[str, Values]:
    """Both forms of the reward on every row, of a player whose values are off by so many centipawns a move and, all of
    a position alike, a position. Mates are seen."""
    scores = []
    for number, row in enumerate(rows("policy")):
        rng = np.random.default_rng(number)
        true = np.array(row["legal_cp"])
        off = noise * rng.standard_normal(len(true)) + of_position * rng.standard_normal()
        believed = np.where(abs(true) >= MATE_CP, true, np.clip(true + off.round(), 1 - MATE_CP, MATE_CP - 1))
        order = np.argsort(-believed, kind="stable")
        listed = chooses(order, min(5, len(true)), rng)
        moves = [row["legal_moves"][i] for i in listed]
        text = format_completion(moves, writes(believed[listed], true[listed]), moves[0])
        scores.append(score_policy(text, row["legal_moves"], row["legal_cp"]))
    return {form: np.array([getattr(score, form) for score in scores]) for form in FORMS}


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
@pytest.mark.parametrize("writes", [constant, near_constant, zeros, by_place], ids=lambda each: each.__name__)
@pytest.mark.parametrize("chooses", [best, spread, any_legal], ids=lambda each: each.__name__)
def test_evals_that_say_nothing_add_little_to_the_moves(chooses: Chooses, writes: Writes, form: str) -> None:
    """Even the best constant, which is an oracle's: where all five are equal, to a tenth of a pawn, it is the truth."""
    added = earned(chooses, writes=writes)[form] - earned(chooses, writes=wrong)[form]
    assert added.mean() < (0.1 if writes is by_place else 0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_random_legal_mover_is_at_the_bottom_of_the_legal_levels(form: str) -> None:
    for writes in (wrong, zeros, by_place):
        reward = earned(any_legal, writes=writes)[form]
        assert reward.mean() + 3 * reward.std() / len(reward) ** 0.5 < 0.2
        assert (reward > 0.2).mean() < 0.35  # a quarter finds a good move, or plays where nothing is at stake


@pytest.mark.parametrize("form", FORMS)
def test_the_best_move_alone_is_worth_less_than_the_best_five_with_their_evals(form: str) -> None:
    alone = earned(best_and_random, writes=zeros)[form]
    for noise in (0.0, 20.0):
        assert surely_more(earned(best, noise)[form], alone)


def halves(answer: str, other: str) -> list[str]:
    """Boards with the first ranks of one and the last of the other."""
    (one, rest), two = answer.split(" ", 1), other.split(" ", 1)[0]
    ranks = one.split("/"), two.split("/")
    mixed = ["/".join(a[:cut] + b[cut:]) for cut in range(1, 8) for a, b in (ranks, ranks[::-1])]
    return [f"{board} {rest}" for board in mixed if board != one]


def test_a_board_that_is_half_moved_or_mixed_earns_nothing_above_the_bottom() -> None:
    """The man on both of its squares, or on neither; ranks of the input and of the truth; of the truth and of another
    board. En passant, two men go, and one of them may be forgotten; the board of an illegal move is the input."""
    legal = [row for row in rows("environment") if row["stratum"] not in ("illegal", "en_passant")]
    rng = random.Random(0)
    found: dict[str, list[float]] = {"both": [], "neither": [], "mixed with the input": [], "mixed with another": []}

    def score(row: dict[str, Any], answers: Sequence[str], name: str) -> None:
        for answer in answers:
            result = score_environment(row["prompt"], answer, row["target"])
            if not result.placement_exact:
                found[name] += [result.reward, result.continuous]

    for row in rng.sample(legal, 300):
        before, move = row["prompt"].removeprefix("A: ").split("+")[:2]
        played, rest = chess.Board(row["target"].split("+")[0]), row["target"].split(" ", 1)[1]
        origin, target = chess.parse_square(move[:2]), chess.parse_square(move[2:4])
        if chess.Board(before).is_castling(chess.Move.from_uci(move)):
            continue  # the rook has arrived
        played.set_piece_at(origin, played.piece_at(target))
        score(row, [f"{played.board_fen()} {rest}"], "both")
        played.remove_piece_at(origin)
        played.remove_piece_at(target)
        score(row, [f"{played.board_fen()} {rest}"], "neither")
        score(row, halves(row["target"], before), "mixed with the input")
        score(row, halves(row["target"], rng.choice(legal)["target"]), "mixed with another")
    for name in ("both", "neither", "mixed with the input"):
        assert len(found[name]) > 400
        assert max(found[name]) <= 0.2, name
    assert np.mean(found["mixed with another"]) < 0.2
