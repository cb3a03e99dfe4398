"""`P:` scores: truth at 1, cheats at the bottom, levels as written down, and nothing a model writes can raise."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rookworld_trl.chess.policy import PADDED, SINGLE, format_completion, win_chance
from rookworld_trl.chess.rewards import score_policy
from tests.support.positions import POLICY_FENS, best_first, spread_values

# Twelve moves of a made-up position, best first, in centipawns. Win chance falls by about 9 points a pawn near 0.
MOVES = ["e2e4", "d2d4", "g1f3", "c2c4", "b1c3", "g2g3", "a2a3", "h2h3", "f2f3", "a2a4", "h2h4", "g2g4"]
VALUES = [50, 45, 30, 20, 10, -40, -100, -150, -200, -250, -300, -900]
GOLD = " M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 0.5 0.5 0.3 0.2 0.1 B: e2e4"


def written(centipawns: int) -> str:
    """The text of a value: pawns with one decimal, mates +-1000.0. The test's values need nothing finer."""
    return f"{math.copysign(1000, centipawns):.1f}" if abs(centipawns) >= 9000 else f"{centipawns / 100:.1f}"


def gold_row(moves: list[str], values: list[int], padded: bool = False) -> str:
    top = best_first(moves, values)[:5]
    return format_completion(
        [move for move, _ in top], [written(cp) for _, cp in top], top[0][0], PADDED if padded else SINGLE
    )


@pytest.mark.parametrize("fen", POLICY_FENS.values(), ids=POLICY_FENS.keys())
@pytest.mark.parametrize("padded", [False, True])
def test_truth_scores_one(fen: str, padded: bool) -> None:
    moves, values = spread_values(fen)
    score = score_policy(gold_row(moves, values, padded), moves, values)
    assert (score.reward, score.continuous, score.level) == (1.0, 1.0, 5)
    assert (score.best_value, score.best_loss, score.evals_score) == (1.0, 0.0, 1.0)
    assert score.n_candidates == min(5, len(moves))
    assert score.parsed
    assert score.best_legal
    assert score.candidates_legal_distinct
    assert score.best_in_moves
    assert score.best_in_top5
    assert score.top1


@pytest.mark.parametrize(
    "values",
    [
        [0] * 12,  # a dead draw: every move is best, and constant evals are the truth
        [9999] * 3 + [500] * 9,  # several mates in one
        [9999, 9997, 9995, 800, 700, 600, 500, 400, 300, 200, 100, 0],
        [-9998] * 12,  # lost whatever is played
        [12, 11, 9, 8, 8, 0, 0, 0, 0, 0, 0, 0],  # flat: all written 0.1
        [2950, 2000, 1000, 995, 990, 0, 0, 0, 0, 0, 0, -9998],
    ],
)
def test_truth_scores_one_for_special_values(values: list[int]) -> None:
    top = best_first(MOVES, values)[:5]
    evals = [f"{cp / 100:.0f}.0" if 995 <= abs(cp) < 9000 else written(cp) for _, cp in top]
    score = score_policy(format_completion([move for move, _ in top], evals, top[0][0]), MOVES, values)
    assert (score.reward, score.continuous, score.evals_score) == (1.0, 1.0, 1.0)


def test_any_of_several_best_moves_counts() -> None:
    values = [50, 50, 50, 20, 10, *VALUES[5:]]
    for best in ("e2e4", "d2d4", "g1f3"):
        score = score_policy(f" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 0.5 0.5 0.5 0.2 0.1 B: {best}", MOVES, values)
        assert score.top1
        assert (score.reward, score.continuous) == (1.0, 1.0)


def test_any_of_several_fifth_best_moves_counts() -> None:
    values = [400, 50, 30, 20, 10, 10, *VALUES[6:]]
    score = score_policy(" M: e2e4 d2d4 g1f3 c2c4 g2g3 E: 4.0 0.5 0.3 0.2 0.1 B: g2g3", MOVES, values)
    assert score.best_in_top5
    assert score.reward == 0.6


def cheats(moves: list[str], values: list[int]) -> dict[str, str]:
    """What earlier rewards paid for, and more of the kind, for a position with different values."""
    ranked = best_first(moves, values)
    top = [move for move, _ in ranked[:5]]
    evals = [written(cp) for _, cp in ranked[:5]]
    best, n = top[0], len(top)
    gold = format_completion(top, evals, best)
    found = {
        "empty": "",
        "only sections": " M: E: B:",
        "no moves": f" M: E: 0.3 B: {best}",
        "no evals": f" M: {' '.join(top)} E: B: {best}",
        "no best": f" M: {' '.join(top)} E: {' '.join(evals)} B: ",
        "best missing": f" M: {' '.join(top)} E: {' '.join(evals)}",
        "several M sections": gold.replace(" E:", f" M: {' '.join(top)} E:", 1),
        "several B sections": f"{gold} B: {best}",
        "gold twice": gold + gold,
        "text around": f"Surely{gold}",
        "text behind": f"{gold} wins",
        "spaces behind": f"{gold} ",
        "spaces between": gold.replace(" E:", f"{'':30}E:", 1),
        "newline": gold.replace(" E:", "\nE:"),
        "castling by name": gold.replace(best, "O-O"),
        "upper case": gold.upper(),
        "echo": f"P: 8/8/8/8/8/8/8/8 w - - 0 1{gold}",
        "one eval too many": format_completion(top, [*evals, "0.0"], best),
        "best is no candidate": format_completion(top, evals, ranked[5][0] if len(ranked) > 5 else "a1a1"),
        "illegal best": format_completion(top, evals, "a1a1"),
        "illegal best and candidate": format_completion(["a1a1", *top[1:]], evals, "a1a1"),
        "all illegal": format_completion(["a1a1"] * n, evals, "a1a1"),
    }
    if n > 1:
        found |= {
            "one move": format_completion([best], evals[:1], best),
            "one move, n times": format_completion([best] * n, [evals[0]] * n, best),
            "one move, n times, right evals": format_completion([best] * n, evals, best),
            "one eval": format_completion(top, evals[:1], best),
            "one twice": format_completion([*top[:-1], best], evals, best),
            "constant evals": format_completion(top, [evals[0]] * n, best),
            "zero evals": format_completion(top, ["0.0"] * n, best),
            "constant evals, spelled differently": format_completion(
                top, ["0.0", "0.00", "-0.0", "+0.0", "0"][:n], best
            ),
            "constant evals, a digit changed": format_completion(top, [*["0.0"] * (n - 1), "0.0001"], best),
            "the best's eval, a digit changed": format_completion(top, [f"{evals[0]}01", *[evals[0]] * (n - 1)], best),
        }
    if len(ranked) >= 10:
        ten = ranked[:10]
        found["ten moves"] = format_completion([move for move, _ in ten], [written(cp) for _, cp in ten], best)
        found["six moves"] = format_completion([move for move, _ in ten[:6]], [written(cp) for _, cp in ten[:6]], best)
    return found


@pytest.mark.parametrize("fen", POLICY_FENS.values(), ids=POLICY_FENS.keys())
def test_cheats_score_at_the_bottom(fen: str) -> None:
    moves, values = spread_values(fen)
    for name, completion in cheats(moves, values).items():
        score = score_policy(completion, moves, values)
        assert score.reward <= 0.2, name
        assert score.continuous <= 0.2, name


@pytest.mark.parametrize("fen", [fen for name, fen in POLICY_FENS.items() if name != "one_legal"])
def test_the_worst_legal_moves_with_made_up_evals_stay_low(fen: str) -> None:
    moves, values = spread_values(fen)
    ranked = best_first(moves, values)
    worst = [move for move, _ in ranked[-5:]][::-1]
    for evals in (["0.5", "0.4", "0.3", "0.2", "0.1"], ["1000.0", "999.0", "998.0", "997.0", "996.0"]):
        score = score_policy(format_completion(worst, evals[: len(worst)], worst[0]), moves, values)
        assert score.reward <= 0.4
        assert score.continuous < 0.75


def test_the_worst_of_a_wide_position_is_near_the_bottom() -> None:
    worst = " M: g2g4 h2h4 a2a4 f2f3 h2h3 E: {} B: g2g4"
    score = score_policy(worst.format("0.5 0.4 0.3 0.2 0.1"), MOVES, VALUES)
    # Win chance lost: 0.510798; (1 - 0.510798)³ = 0.117076, twice in a valid list; all five are legal.
    assert score.level == 1
    assert score.reward == score.continuous == pytest.approx(0.2 * (1 + 2 * 0.117076) / 4, abs=1e-6)
    score = score_policy(worst.format("-9.0 -3.0 -2.5 -2.0 -1.5"), MOVES, VALUES)
    assert score.evals_score == 1.0
    assert score.reward == 0.4
    assert score.continuous < 0.55


@pytest.mark.parametrize(
    ("best", "reward"),
    [
        ("e2e4", 1.0),  # best
        ("d2d4", 1.0),  # 5 cp worse: 0.5 points
        ("g1f3", 0.8),  # 20 cp worse: 1.8 points
        ("c2c4", 0.8),  # 30 cp: 2.7 points
        ("b1c3", 0.6),  # 40 cp: 3.7 points, fifth
    ],
)
def test_levels(best: str, reward: float) -> None:
    completion = f" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 0.5 0.4 0.3 0.2 0.1 B: {best}"
    assert score_policy(completion, MOVES, VALUES).reward == reward
    uninformative = score_policy(completion.replace("0.5 0.4 0.3 0.2 0.1", "0.3 0.3 0.3 0.3 0.2999"), MOVES, VALUES)
    assert uninformative.level == 1
    assert uninformative.reward < 0.151


def test_a_legal_list_with_a_poor_best_move_is_on_the_third_step() -> None:
    score = score_policy(" M: e2e4 d2d4 g1f3 c2c4 g2g3 E: 0.5 0.4 0.3 0.2 0.1 B: g2g3", MOVES, VALUES)
    assert not score.best_in_top5
    assert (score.reward, score.level) == (0.4, 2)


def test_close_values_count_although_not_in_the_top_five() -> None:
    values = [50, 49, 48, 47, 46, 45, *VALUES[6:]]
    score = score_policy(" M: e2e4 d2d4 g1f3 c2c4 g2g3 E: 0.5 0.5 0.5 0.5 0.5 B: g2g3", MOVES, values)
    assert not score.best_in_top5
    assert score.reward == 1.0  # 5 cp: half a point


def test_the_worst_of_few_legal_moves_is_not_a_top_five_move() -> None:
    completion = " M: a1a2 a1b1 a1b2 E: 3.0 0.0 -3.0 B: a1b2"
    score = score_policy(completion, ["a1a2", "a1b1", "a1b2"], [300, 0, -300])
    assert score.best_in_top5  # the plain metric
    assert score.reward == 0.4
    assert score_policy(completion[:-4] + "a1b1", ["a1a2", "a1b1", "a1b2"], [300, 0, -300]).reward == 0.6


def test_fields_by_hand() -> None:
    score = score_policy(" M: e2e4 d2d4 g1f3 a1a1 g1f3 E: 0.5 0.4 0.3 0.2 0.1 B: g2g4", MOVES, VALUES)
    assert score.n_candidates == 5
    assert not score.candidates_legal_distinct
    assert not score.best_in_moves
    assert score.best_legal
    # 1 / (1 + e^(-0.00368208 * 50)) = 0.545896; of -900: 0.035098
    assert score.best_loss == pytest.approx(0.510798, abs=1e-6)
    assert score.best_value == pytest.approx(0.489202, abs=1e-6)
    assert score.evals_score == 0.0
    assert score.level == 1
    # three of five candidates, and the value of B to the third power, once only: the list isn't valid
    assert score.reward == score.continuous == pytest.approx(0.2 * (0.6 + 0.117076) / 4, abs=1e-6)


def test_continuous_form_by_hand() -> None:
    moves, values = ["a1a2", "a1b1"], [9999, 0]
    right = " M: a1a2 a1b1 E: 1000.0 0.0 B: a1b1"
    # B loses half the win chance: 0.2 * (1 + 2 / 8 + 1) / 4 + 0.8 * (0.7 / 8 + 0.15 + 0.15)
    assert score_policy(right, moves, values).continuous == pytest.approx(0.4225)
    # The best constant errs by 0.25 a move; 0.0 and -0.1 (0.4908 in win chance) by more: 0.2 * (1 + 2) / 4
    assert score_policy(" M: a1a2 a1b1 E: 0.0 -0.1 B: a1a2", moves, values).continuous == pytest.approx(0.15)
    # 3.0 is a win chance of 0.751126: a mean error of 0.124437, half of the constant's
    score = score_policy(" M: a1a2 a1b1 E: 3.0 0.0 B: a1a2", moves, values)
    assert score.evals_score == pytest.approx(0.502251, abs=1e-6)
    assert score.continuous == pytest.approx(0.2 + 0.8 * (0.85 + 0.15 * 0.502251), abs=1e-6)
    assert score.reward == 1.0
    # 1.0 is 0.591026: 0.204487, e = 0.182052, which is 0.910260 of the margin
    score = score_policy(" M: a1a2 a1b1 E: 1.0 0.0 B: a1a2", moves, values)
    base = 0.2 * (1 + 2 + 0.910260) / 4
    assert score.reward == pytest.approx(base, abs=1e-6)
    assert score.continuous == pytest.approx(base + 0.8 * 0.910260 * (0.85 + 0.15 * 0.182052), abs=1e-6)


def test_better_evals_score_higher() -> None:
    scores = [
        score_policy(f" M: e2e4 d2d4 g1f3 c2c4 g2g4 E: {evals} B: e2e4", MOVES, VALUES).continuous
        for evals in ("0.5 0.4 0.3 0.2 -9.0", "0.5 0.4 0.3 0.2 -8.0", "0.5 0.4 0.3 0.2 -7.0", "-9.0 0.3 0.3 0.2 0.5")
    ]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4


def test_a_blunder_in_the_list_makes_its_evals_no_easier() -> None:
    """The best five deviate by 0.012 from their median, the list by 0.10; evals may err by 0.02 at most in both."""
    scores = [
        score_policy(f" M: e2e4 d2d4 g1f3 c2c4 g2g4 E: 0.5 0.5 0.3 0.2 {eval} B: e2e4", MOVES, VALUES).evals_score
        for eval in ("-9.0", "-5.0")
    ]
    # -5.0 is 0.136908, -9.0 is 0.035098: a mean error of 0.020362
    assert scores == [1.0, 0.0]


def test_evals_are_right_as_the_engine_has_them_and_as_rows_write_them() -> None:
    values = [52, 48, 33, 21, 9, *VALUES[5:]]
    for evals in ("0.52 0.48 0.33 0.21 0.09", "0.5 0.5 0.3 0.2 0.1"):
        score = score_policy(f" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: {evals} B: e2e4", MOVES, values)
        assert score.continuous == pytest.approx(1.0)
        assert score.reward == 1.0


def test_equal_moves_ask_for_the_level() -> None:
    """One legal move or several of one value: 0.02 in win chance is the least error that scores nothing."""
    for moves in (["a1a2"], ["a1a2", "a1b1", "a1b2"]):
        listed = " ".join(moves)
        for eval, level in (("1.0", 5), ("1.1", 5), ("1.3", 1), ("0.0", 1)):  # 0.591, 0.600, 0.617, 0.5
            evals = " ".join([eval] * len(moves))
            score = score_policy(f" M: {listed} E: {evals} B: a1a2", moves, [100] * len(moves))
            assert score.level == level


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-1500, 1500) | st.sampled_from([9995, -9990]), min_size=2, max_size=5),
    st.floats(-15, 15),
    st.lists(st.integers(-9, 9), min_size=5, max_size=5),
    st.data(),
)
def test_constants_with_the_last_digit_changed_earn_nothing(
    values: list[int], constant: float, digits: list[int], data: st.DataObject
) -> None:
    assume(len({float(written(cp)) for cp in values}) > 1)
    moves = MOVES[: len(values)]
    centre = data.draw(st.sampled_from([constant, *(cp / 100 for cp in values)]))
    evals = [f"{max(-1000.0, min(1000.0, centre + digit / 10_000)):.4f}" for digit in digits[: len(values)]]
    best, _ = best_first(moves, values)[0]
    score = score_policy(format_completion(moves, evals, best), moves, values)
    assert score.level == 1
    assert score.continuous <= 0.2


def test_weak_completions_have_something_to_climb() -> None:
    """Unparsable < illegal best < legal poor best < legal good best < more legal candidates, all at 0.2 or below."""
    rising = [
        "M e2e4",
        " M: a1a1 E: 0.0 B: a1a1",
        " M: a1a1 E: 0.0 B: g2g4",
        " M: a1a1 E: 0.0 B: e2e4",
        " M: e2e4 E: 0.0 B: e2e4",
        " M: e2e4 d2d4 g1f3 c2c4 E: 0.5 0.4 0.3 0.2 B: e2e4",
    ]
    scores = [score_policy(completion, MOVES, VALUES).continuous for completion in rising]
    assert all(low < high for low, high in pairwise(scores))
    assert scores[0] == -0.3
    assert scores[-1] <= 0.2


def test_mates_are_certain() -> None:
    assert win_chance(9999) == win_chance(9001) == 1.0
    assert win_chance(-9999) == 0.0
    assert win_chance(0) == 0.5
    score = score_policy(" M: a1a2 a1b1 E: 1000.0 999.0 B: a1b1", ["a1a2", "a1b1"], [9999, 9995])
    assert score.best_loss == 0.0
    assert not score.top1
    assert score.reward == 1.0  # a longer mate is still won


def test_data_errors_are_raised() -> None:
    with pytest.raises(ValueError, match="legal_cp"):
        score_policy(GOLD, MOVES, VALUES[:-1])
    with pytest.raises(ValueError, match="at least one legal move"):
        score_policy(GOLD, [], [])


junk = st.one_of(
    st.text(max_size=120),
    st.text("MEB: .-+0123456789abcdefgh\n", max_size=120),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e999", "9" * 5000, "٣.٥", "²", "1_0", "--1", "9999.9999", "-9999", " " * 5000]
    ),
)


@st.composite
def mutated_gold(draw: st.DrawFn) -> str:
    if draw(st.booleans()):
        words = GOLD.split(" ")
        for _ in range(draw(st.integers(1, 3))):
            words[draw(st.integers(0, len(words) - 1))] = draw(st.one_of(junk, st.sampled_from(words)))
        return " ".join(words)
    start, length = draw(st.integers(0, len(GOLD))), draw(st.integers(0, 6))
    return GOLD[:start] + draw(junk) + GOLD[start + length :]


@settings(max_examples=400, deadline=None)
@given(st.one_of(junk, mutated_gold()))
@example("\ud800")
@example(" M:" + " e2e4" * 5000 + " E:" + " 0.1" * 5000 + " B: e2e4")
def test_no_text_raises_or_leaves_the_range(completion: str) -> None:
    score = score_policy(completion, MOVES, VALUES)
    for value in (score.reward, score.continuous):
        assert -0.3 <= value <= 1.0
    for value in (score.best_value, score.best_loss, score.evals_score):
        assert 0.0 <= value <= 1.0
    assert score.best_value == pytest.approx(1.0 - score.best_loss)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-9999, 9999), min_size=1, max_size=12), st.data())
def test_the_range_holds_for_any_values(values: list[int], data: st.DataObject) -> None:
    moves = MOVES[: len(values)]
    picked = data.draw(st.lists(st.sampled_from(moves), min_size=1, max_size=6))
    evals = data.draw(
        st.lists(st.sampled_from(["0.0", "-1.5", "30.0", "1000.0", "-1000.0", "9999"]), min_size=1, max_size=6)
    )
    score = score_policy(format_completion(picked, evals, data.draw(st.sampled_from(moves))), moves, values)
    assert -0.3 <= score.reward <= 1.0
    assert -0.3 <= score.continuous <= 1.0
    assert (score.reward > 0.2) == (score.level > 1)
