"""Skill against a random legal mover, trivial players, losses beside gains, intervals by game: all by hand."""

from typing import Any

import chess
import pytest

from rookworld_trl.chess.accuracy import most_material, score
from rookworld_trl.chess.rewards import score_policy
from rookworld_trl.chess.rewards.policy_score import skill
from rookworld_trl.measuring import Comparison, Result, compare, compare_groups, comparison_table, of, result_table

SETTINGS = {"temperature": 1.0, "max_new_tokens": 99, "seed": 0}
WON, EVEN, LOST = 9_990, 0, -9_990  # win chances of exactly 1, 1/2 and 0

FIVE_MOVES = "7k/7p/8/8/8/8/K7/8 w - - 0 1"
SIX_MOVES = "8/8/8/k7/8/7p/8/7K b - - 0 1"
# Values against the best: 1, .5, .5, 0, 0 in alphabetical order; a random legal move has .4.
FIRST = {"a2a1": WON, "a2a3": EVEN, "a2b1": EVEN, "a2b2": LOST, "a2b3": LOST}
# 1, 1, 1, 1, .5, .5; a random legal move has 5/6.
SECOND = {"a5a4": EVEN, "a5a6": EVEN, "a5b4": EVEN, "a5b5": EVEN, "a5b6": LOST, "h3h2": LOST}


def row(fen: str, values: dict[str, int], **more: Any) -> dict[str, Any]:
    columns = {"legal_moves": list(values), "legal_cp": list(values.values())}
    return {"prompt": f"P: {fen}", "task": "policy", "target": "", "stratum": "endgame", **columns, **more}


def plays(*moves: str) -> list[str]:
    return [f" M: {move} E: 0.0 B: {move}" for move in moves]


def played(rows: list[dict[str, Any]], *moves: str) -> list[Result]:
    return score(rows, plays(*moves), settings=SETTINGS)


def value(evaluation: list[Result], metric: str) -> float | None:
    return of(evaluation, "policy").estimates()[metric]["value"]


@pytest.fixture
def pair() -> list[dict[str, Any]]:
    return [row(FIVE_MOVES, FIRST), row(SIX_MOVES, SECOND)]


# Skill ---------------------------------------------------------------------------------------------------------------


def test_skill_by_hand(pair: list[dict[str, Any]]) -> None:
    got = played(pair, "a2a3", "h3h2")  # worth .5 each
    assert value(got, "legal_value") == pytest.approx(0.5)
    # ((.5 - .4) + (.5 - 5/6)) / ((1 - .4) + (1 - 5/6)) = (-7/30) / (23/30)
    assert value(got, "skill") == pytest.approx(-7 / 23)
    assert value(played(pair, "a2a1", "a5a4"), "skill") == pytest.approx(1.0)


def test_only_legal_answers_are_judged_and_against_their_own_positions(pair: list[dict[str, Any]]) -> None:
    got = played(pair, "a2a8", "h3h2")
    assert value(got, "best_legal") == 0.5
    assert value(got, "legal_value") == 0.5
    assert value(got, "best_value") == 0.25
    assert value(got, "skill") == pytest.approx(-2.0)  # (1/2 - 5/6) / (1/6)
    assert value(played(pair, "a2a8", "a1a1"), "skill") is None


def test_the_live_lines_skill_is_that_of_evaluation(pair: list[dict[str, Any]]) -> None:
    texts = plays("a2a3", "h3h2")
    values = [one["legal_cp"] for one in pair]
    scores = [score_policy(text, one["legal_moves"], one["legal_cp"]) for text, one in zip(texts, pair, strict=True)]
    assert skill([*scores, None], [*values, []]) == pytest.approx(-7 / 23)
    assert skill([score_policy("junk", list(FIRST), values[0])], values[:1]) is None


def test_nothing_at_stake_is_counted_apart() -> None:
    """One point of win chance is 10.9 centipawns near 0: 1 / (1 + exp(-0.00368208 * 10.9)) = 0.51003."""
    rows = [row(FIVE_MOVES, {**dict.fromkeys(FIRST, 0), "a2b3": cp}) for cp in (-10, -12)] + [row(FIVE_MOVES, FIRST)]
    got = played(rows, "a2a1", "a2a1", "a2a1")
    assert [item.groups["stake"] for item in got[0].items] == ["nothing", "something", "something"]
    assert [pair for pair in got[0].groups() if pair[0] == "stake"] == [("stake", "nothing"), ("stake", "something")]
    assert of(got, "policy").estimates(stake="nothing")["skill"]["denominator"] < 0.01
    words = [line.split()[:2] for line in result_table(got).splitlines()]
    assert ["nothing", "1"] in words
    assert ["something", "2"] in words


# Trivial players -----------------------------------------------------------------------------------------------------


def test_trivial_players_by_hand(pair: list[dict[str, Any]]) -> None:
    got = of(played(pair, "a2b3", "a5b6"), "policy").baselines()
    assert got["best_legal"] == {"random legal": 1.0, "first legal": 1.0, "most material": 1.0}
    assert got["best_value"]["random legal"] == pytest.approx((0.4 + 5 / 6) / 2)
    assert got["best_value"]["first legal"] == 1.0  # a2a1 and a5a4
    assert got["top1"]["random legal"] == pytest.approx((1 / 5 + 4 / 6) / 2)
    assert got["best_in_top5"]["random legal"] == 1.0  # the fifth best of six equals the sixth
    assert got["skill"] == pytest.approx({"random legal": 0.0, "first legal": 1.0, "most material": 1.0}, abs=1e-12)


@pytest.mark.parametrize(
    ("fen", "best"),
    [
        ("3r4/4P1k1/8/8/8/8/8/4K3 w - - 0 1", "e7d8q"),  # a rook and eight pawns
        ("3q4/8/8/8/2r5/1P6/8/3RK2k w - - 0 1", "d1d8"),  # a queen before a rook
        ("3q4/P7/8/8/8/8/8/3RK2k w - - 0 1", "d1d8"),  # a queen before a pawn that becomes one
        ("rnbqkbnr/ppp1p1pp/8/3pPp2/8/8/PPPP1PPP/RNBQKBNR w KQkq f6 0 3", "e5f6"),  # in passing, a pawn
        ("8/8/8/k7/8/7p/8/7K b - - 0 1", "a5a4"),  # nothing to win: the first
        ("7k/8/8/2n1n3/3P4/8/8/K7 w - - 0 1", "d4c5"),  # two knights: the first
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "a1a8"),  # castling takes no rook
    ],
)
def test_most_material_by_hand(fen: str, best: str) -> None:
    moves = [move.uci() for move in chess.Board(fen).legal_moves]
    assert most_material(fen, moves) == best
    assert most_material(fen, moves[::-1]) == best


# Paired comparison ---------------------------------------------------------------------------------------------------


def pick(rows: list[Comparison], metric: str) -> Comparison:
    return next(found for found in rows if found["metric"] == metric)


def test_intervals_go_by_game_where_items_share_one() -> None:
    """Ten games of twenty equal items: ten independent draws, not two hundred."""
    right, wrong = "a2a1", "a2a8"
    rows = [row(FIVE_MOVES, FIRST, game=str(i // 20)) for i in range(200)]
    moves = [right if i < 100 else wrong for i in range(200)]
    by_game = played(rows, *moves)
    apart = played([{**one, "game": str(i)} for i, one in enumerate(rows)], *moves)
    legal = of(by_game, "policy").estimates()["best_legal"]
    assert legal["value"] == 0.5
    # Of ten coins: P(at most 1 head) = 1.1 %, P(none) = 0.1 %. The quantile is that of t with 9 degrees of freedom,
    # -2.262 sqrt(10/9), so that 0.9 % lie below it: 1 head, and 9.
    assert (legal["ci_low"], legal["ci_high"]) == (0.1, 0.9)
    assert of(apart, "policy").estimates()["best_legal"]["ci_low"] == pytest.approx(0.431, abs=1e-3)  # Wilson
    same = played(rows, *[right] * 200)
    change = pick(compare(by_game, same), "best_legal")
    assert (change["ci_low"], change["ci_high"]) == pytest.approx((0.1, 0.9))
    assert "bootstrap over 10 games" in result_table(by_game)


def test_losses_stand_beside_gains() -> None:
    """More legal moves, worse ones: 20 of 40 illegal and 20 best before; all legal and worth .5 after."""
    rows = [row(FIVE_MOVES, FIRST)] * 40
    before, after = played(rows, *["a2a8"] * 20, *["a2a1"] * 20), played(rows, *["a2a3"] * 40)
    found = compare(before, after)
    assert pick(found, "best_legal")["difference"] == 0.5
    assert pick(found, "skill")["difference"] == pytest.approx(1 / 6 - 1)  # (.5 - .4) / (1 - .4) after
    losses = {one["metric"] for one in found if one["loss"]}
    # The best gains .6, those worth .5 a tenth, a random move .16; B: has a share of .714321, and .028578 is left. With
    # fines of .24 for four missing candidates the best earns .5029, level 2; one worth .5 -.308829, squeezed -.138159;
    # an illegal one, fined .8, -1.031175, squeezed -.201216.
    assert pick(found, "reward")["difference"] == pytest.approx(-0.138159 - (0.4 - 0.201216) / 2, abs=1e-6)
    assert losses == {"skill", "legal_value", "top1", "reward", "continuous"}
    for only in (False, True):
        table = comparison_table(found, headlines_only=only)
        part = table[table.index("Significant losses") :].splitlines()
        assert part[0] == "Significant losses: 5 of 13 metrics"
        assert part[1].split()[:2] == ["P:", "skill"]
        assert part[1].endswith("- greedy")
        assert ("candidates legal" in table[: table.index("Significant losses")]) is not only
    assert {(one["group"], one["metric"]): one["loss"] for one in compare_groups(before, after)} == {
        (group, metric): metric == "skill"
        for group in ("color=white", "stake=something", "stratum=endgame")
        for metric in ("best_legal", "skill")
    }
    by_group = comparison_table(found, headlines_only=True, groups=compare_groups(before, after))
    assert "Significant losses: 3 of 6 headline metrics by group" in by_group
    assert "P: stratum=endgame: skill *" in by_group
    assert max(map(len, by_group.splitlines())) <= 100
    calm = compare(before, before)
    assert "Significant losses: none among 13 metrics." in comparison_table(calm)
