"""`P:` scores: truth at 1, cheats at the bottom, levels as written down, and nothing a model writes can raise."""

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rookworld_trl.chess.policy import PADDED, SINGLE, format_completion, format_eval
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


def test_any_of_several_best_moves_counts() -> None:
    values = [50, 50, 50, 20, 10, *VALUES[5:]]
    for best in ("e2e4", "d2d4", "g1f3"):
        score = score_policy(f" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 0.5 0.5 0.5 0.2 0.1 B: {best}", MOVES, values)
        assert score.top1
        assert (score.reward, score.continuous) == (1.0, 1.0)


def cheats(moves: list[str], values: list[int]) -> tuple[dict[str, str], dict[str, str]]:
    """What earlier rewards paid for, and more of the kind, for a position with different values.

    The second ones know the best move and write it at `B:`, in a list or with evals that are worth little: not at the
    bottom, since the move is what gets played, but below every honest list of good moves.
    """
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
        "illegal best and candidate": format_completion(["a1a1", *top[1:]], evals, "a1a1"),
        "all illegal": format_completion(["a1a1"] * n, evals, "a1a1"),
    }
    knowing = {"one eval too many": format_completion(top, [*evals, "0.0"], best)}
    if n > 1:
        knowing |= {
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
        for count in (6, 10):
            listed, true = zip(*ranked[:count], strict=True)
            knowing[f"{count} moves"] = format_completion(listed, [written(cp) for cp in true], best)
    return found, knowing


@pytest.mark.parametrize("fen", POLICY_FENS.values(), ids=POLICY_FENS.keys())
def test_cheats(fen: str) -> None:
    moves, values = spread_values(fen)
    right = score_policy(gold_row(moves, values), moves, values)
    bottom, knowing = cheats(moves, values)
    for name, completion in bottom.items():
        score = score_policy(completion, moves, values)
        assert max(score.reward, score.continuous) <= 0.2, name
    for name, completion in knowing.items():
        assert score_policy(completion, moves, values).continuous < right.continuous - 0.05, name
    top = best_first(moves, values)
    for best in ("a1a1", top[5][0] if len(top) > 5 else "a1a1"):  # illegal, and no candidate
        assert score_policy(gold_row(moves, values).rpartition(" ")[0] + f" {best}", moves, values).continuous <= 0.8


# The position of `MOVES` by hand, from win chances 1 / (1 + e^(-0.00368208 cp)): their mean is .39772. The best five
# deviate by .01192 from their median.
CHANCES = [1 / (1 + math.exp(-0.00368208 * cp)) for cp in VALUES]
GAINS = [max(0.0, chance - sum(CHANCES) / 12) for chance in CHANCES]
AT_STAKE = {"B": GAINS[0] - sum(GAINS) / 12, "M": sum(GAINS[:5]) / 5 - sum(GAINS) / 12}
AT_STAKE["E"] = sum(abs(chance - CHANCES[2]) for chance in CHANCES[:5]) / 5
SHARES = {
    name: weight / (1 + (0.006 / AT_STAKE[name]) ** 2) for name, weight in {"B": 0.5, "M": 0.3, "E": 0.18}.items()
}
SHARES = {name: share / (0.02 + sum(SHARES.values())) for name, share in SHARES.items()}


def expected(best: int | None, listed: list[int], evals: float, fines: float = 0.0) -> float:
    """The reward of an answer in that position, from the formula in docs/rewards.md, without the squeeze."""
    of_random = sum(GAINS) / 12
    of_best = ((0.0 if best is None else GAINS[best]) - of_random) / AT_STAKE["B"]
    of_list = (sum(GAINS[i] for i in listed) / 5 - of_random) / AT_STAKE["M"]
    return 1 - sum(SHARES.values()) + SHARES["B"] * of_best + SHARES["M"] * of_list + SHARES["E"] * evals - fines


def squeezed(reward: float) -> float:
    return reward / (1 + abs(reward) / 0.25)


def test_the_position_by_hand() -> None:
    assert GAINS[:8] == pytest.approx([0.14818, 0.14361, 0.12987, 0.12069, 0.11149, 0.06553, 0.01126, 0], abs=1e-5)
    assert pytest.approx({"B": 0.08730, "M": 0.06988, "E": 0.01192}, abs=1e-5) == AT_STAKE
    assert pytest.approx({"B": 0.51888, "M": 0.31051, "E": 0.14976}, abs=1e-5) == SHARES


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (GOLD, 1.0),
        # another best move of the list; evals in tenths are right
        (GOLD.replace("B: e2e4", "B: d2d4"), expected(1, [0, 1, 2, 3, 4], 1.0)),
        (GOLD.replace("B: e2e4", "B: b1c3"), expected(4, [0, 1, 2, 3, 4], 1.0)),
        # constants, whatever their level: the moves alone
        (" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 0.3 0.3 0.3 0.3 0.3 B: e2e4", None),
        (" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 9.0 9.0 9.0 9.0 9.0 B: e2e4", expected(0, [0, 1, 2, 3, 4], 0.0)),
        # evals in the right order that say nothing else: half
        (" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 9.0 8.0 7.0 6.0 5.0 B: e2e4", expected(0, [0, 1, 2, 3, 4], 0.5)),
        # the best with the four worst, all evals right: the best alone gains, the blunders pay for nothing else
        (" M: e2e4 g2g4 h2h4 a2a4 f2f3 E: 0.5 -9.0 -3.0 -2.5 -2.0 B: e2e4", expected(0, [0], 1.0)),
        # fines: of an unlisted, an illegal best move, of candidates that are missing, repeated, illegal or too many
        (GOLD.replace("B: e2e4", "B: g2g3"), expected(5, [0, 1, 2, 3, 4], 1.0, 0.25)),
        (GOLD.replace("B: e2e4", "B: a1a1"), squeezed(expected(None, [0, 1, 2, 3, 4], 1.0, 0.5))),
        (" M: e2e4 d2d4 g1f3 E: 0.5 0.5 0.3 B: e2e4", expected(0, [0, 1, 2], 0.0, 0.3 * 2 / 5)),
        (" M: e2e4 e2e4 g1f3 a1a1 b1c3 E: 0.5 0.5 0.3 0.2 0.1 B: e2e4", expected(0, [0, 2, 4], 0.0, 0.3 * 2 / 5)),
        (
            " M: e2e4 d2d4 g1f3 c2c4 b1c3 g2g3 E: 0.5 0.5 0.3 0.2 0.1 -0.4 B: e2e4",
            expected(0, [0, 1, 2, 3, 4], 0.0, 0.3 / 5),
        ),
        # evals missing
        (" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: 0.5 0.5 0.3 B: e2e4", expected(0, [0, 1, 2, 3, 4], 0.0, 0.1)),
    ],
)
def test_continuous_form_by_hand(completion: str, reward: float | None) -> None:
    score = score_policy(completion, MOVES, VALUES)
    if reward is None:  # 0.3 is right for g1f3, and nothing else: no pair is ordered but those with it
        assert score.evals_score <= 0.25
        return
    assert score.continuous == pytest.approx(reward, abs=1e-6)
    level = 1 + sum(reward >= cut for cut in (0.4, 0.6, 0.8, 0.95))
    assert score.level == level
    assert score.reward == (pytest.approx(min(reward, 0.2)) if level == 1 else (0.4, 0.6, 0.8, 1.0)[level - 2])


def test_what_is_below_zero_is_squeezed_above_the_unparsable() -> None:
    nothing = score_policy(" M: a1a1 E: 0.0 B: a1a1", MOVES, VALUES)
    whole = expected(None, [], 0.0, 0.3 + 0.5)
    assert whole < -0.25
    assert nothing.continuous == pytest.approx(squeezed(whole), abs=1e-6)
    assert nothing.reward == nothing.continuous > -0.25


def test_a_blunder_in_the_list_makes_its_evals_no_easier() -> None:
    """An error of the size of the best list's spread (.0118) is too much, though the list's own is ten times that."""
    evals = " M: e2e4 d2d4 g1f3 c2c4 g2g4 E: 0.5 0.5 0.3 0.2 {} B: e2e4"
    right, wrong = (score_policy(evals.format(each), MOVES, VALUES).evals_score for each in ("-9.0", "-5.0"))
    assert right == 1.0
    # -5.0 is 0.136908, -9.0 is 0.035098: a mean error of 0.020362, and all pairs in their order
    assert wrong == 0.5


def test_evals_are_right_as_the_engine_has_them_and_as_rows_write_them() -> None:
    values = [52, 48, 33, 21, 9, *VALUES[5:]]
    for evals in ("0.52 0.48 0.33 0.21 0.09", "0.5 0.5 0.3 0.2 0.1"):
        score = score_policy(f" M: e2e4 d2d4 g1f3 c2c4 b1c3 E: {evals} B: e2e4", MOVES, values)
        assert (score.continuous, score.reward, score.evals_score) == (1.0, 1.0, 1.0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-1500, 1500) | st.sampled_from([9995, -9990]), min_size=2, max_size=12),
    st.floats(-15, 15),
    st.data(),
)
def test_constants_never_earn(values: list[int], constant: float, data: st.DataObject) -> None:
    """No list and no constant, unless it is the very value of a move, earns more than the moves alone."""
    moves = MOVES[: len(values)]
    listed = data.draw(st.permutations(moves))[:5]
    known = {cp / 100 for cp in values} | {float(format_eval(cp, decimals)) for cp in values for decimals in (1, 2)}
    assume(round(constant, 3) not in known)
    assume(max(values) - min(values) > 30)
    score = score_policy(format_completion(listed, [f"{constant:.3f}"] * len(listed), listed[0]), moves, values)
    assert score.evals_score == 0.0 or score.continuous == 1.0


def test_the_order_of_evals_by_hand() -> None:
    """Win chances 1, 1/2, 0: differences 1/2, 1/2, 1."""
    moves, values = ["a1a2", "a1b1", "a1b2"], [9999, 0, -9999]
    score = score_policy(" M: a1a2 a1b1 a1b2 E: 0.3 1.0 0.3 B: a1a2", moves, values)
    assert (score.evals_ordered, score.evals_apart) == (0.0 - 0.5 + 0.5, 2.0)
    score = score_policy(" M: a1a2 a1b1 a1b2 E: 0.5 0.3 0.3 B: a1a2", moves, values)
    assert (score.evals_ordered, score.evals_apart) == (1.5, 2.0)
    assert score_policy(" M: a1a2 a1b1 E: 0.5 0.3 B: a1a2", moves, values).evals_apart == 0.0


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


def test_mates_are_certain() -> None:
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
