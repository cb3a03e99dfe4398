"""Before against after: differences by hand, pairing enforced, no verdict where few games bear on it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rookworld_trl.chess.accuracy import HEADLINES, METRICS, score
from rookworld_trl.measuring import Comparison, Item, Result, compare, compare_groups, comparison_table, result_table
from rookworld_trl.measuring.elo import rate

SETTINGS = {"temperature": 1.0, "max_new_tokens": 99, "seed": 0}


def evaluation(rows: list[dict[str, Any]], right: list[bool], mode: str = "greedy") -> list[Result]:
    """The gold completion where `right`, an unparsable one elsewhere."""
    texts = [row["target"] if ok else "?" for row, ok in zip(rows, right, strict=True)]
    return score(rows, texts, mode, settings=SETTINGS)


def pick(rows: list[Comparison], metric: str) -> Comparison:
    return next(row for row in rows if row["metric"] == metric)


def test_difference_interval_and_test_by_hand(rows: list[dict[str, Any]]) -> None:
    data = [rows[0]] * 100
    before = evaluation(data, [i < 50 for i in range(100)])
    after = evaluation(data, [5 <= i < 70 for i in range(100)])  # 5 lost, 20 gained
    result = pick(compare(before, after), "exact")
    assert (result["before"], result["after"]) == (0.5, 0.65)
    assert result["difference"] == pytest.approx(0.15)
    # The paired standard error: sqrt((25 / 100 - 0.15^2) / 100) = 0.0477.
    assert result["ci_low"] == pytest.approx(0.15 - 1.96 * 0.0477, abs=0.01)
    assert result["ci_high"] == pytest.approx(0.15 + 1.96 * 0.0477, abs=0.01)
    assert result["significant"]
    assert result["items"] == 100


def test_undefined_metrics_stay_undefined(rows: list[dict[str, Any]]) -> None:
    data = rows[:1] * 3
    result = pick(compare(evaluation(data, [True] * 3), evaluation(data, [True] * 3)), "truncated_recall")
    assert [result[name] for name in ("before", "after", "difference", "ci_low", "ci_high")] == [None] * 5
    assert not result["significant"]


def test_different_items_are_refused(rows: list[dict[str, Any]]) -> None:
    right = [True] * 5
    before = evaluation(rows, right)
    changed = [{**row, "legal_cp": [value + 1 for value in row["legal_cp"]]} for row in rows]
    for other in (
        evaluation(rows[:4], right[:4]),
        evaluation(changed, right),  # same prompts, other values
        evaluation([*rows[:4], rows[0]], right),
    ):
        with pytest.raises(ValueError, match="same items"):
            compare(before, other)
    with pytest.raises(ValueError, match="'policy', sampled, was not measured before"):
        compare(before, evaluation(rows, right, "sampled"))


def test_different_settings_are_refused(rows: list[dict[str, Any]]) -> None:
    before = evaluation(rows, [True] * 5)
    for name in ("temperature", "max_new_tokens"):
        with pytest.raises(ValueError, match=name):
            compare(before, [replace(each, settings={**SETTINGS, name: 0.5}) for each in before])
    compare(before, [replace(each, settings={**SETTINGS, "seed": 9}) for each in before])


# Few games, or few items: no interval and no verdict below ten, honest rates of false alarms from there on ------------

Z2 = 1.959964**2


@pytest.fixture
def both(rows: list[dict[str, Any]]) -> tuple[Item, Item]:
    """An `A:` item answered wrong, and answered right."""
    wrong, right = (score(rows[:1], [text])[0].items[0] for text in ("?", rows[0]["target"]))
    return wrong, right


def measured(items: list[Item]) -> list[Result]:
    return [Result("environment", METRICS["environment"], items, "greedy", SETTINGS, HEADLINES["environment"])]


def of_games(both: tuple[Item, Item], right: Any, games: Any) -> list[Result]:
    return measured([replace(both[bool(ok)], game=str(game)) for ok, game in zip(right, games, strict=True)])


@pytest.mark.parametrize("games", [1, 9, 10, 20])
def test_two_models_without_a_difference_are_rarely_told_apart(both: tuple[Item, Item], games: int) -> None:
    """Sixty rows in so many games, 400 times: about one verdict in twenty, and none below ten games.

    A game's rows are alike: each game has its own chance of a right answer, of each model.
    """
    rng, of_row, significant = np.random.default_rng(games), np.arange(60) % games, 0
    for _ in range(400):
        chances = rng.beta(1, 1, (2, games))
        before, after = (of_games(both, rng.random(60) < chance[of_row], of_row) for chance in chances)
        (found,) = compare(before, after, only=["exact"])
        significant += found["significant"]
        assert (found["ci_low"] is None) == (games < 10)
        assert found["clusters"] == games
    assert significant == 0 if games < 10 else 0.02 <= significant / 400 <= 0.075


def test_a_stratum_of_one_item_has_no_verdict(both: tuple[Item, Item]) -> None:
    """It was right before and is wrong after: that was shown as -100.0 [-100.0, -100.0], a significant loss."""
    before = of_games(both, [1] * 13, range(13))
    first, *others = before[0].items
    mate = {**first.groups, "stratum": "mate"}
    before = measured([replace(first, groups=mate), *others])
    after = measured([replace(both[0], groups=mate, game="0"), *others])
    found = {row["group"]: row for row in compare_groups(before, after)}
    lost = found["stratum=mate"]
    assert (lost["difference"], lost["items"], lost["clusters"]) == (-1.0, 1, 1)
    assert [lost[name] for name in ("ci_low", "ci_high")] == [None] * 2
    assert (lost["significant"], lost["loss"]) == (False, False)
    assert found["stratum=quiet"]["ci_low"] is not None
    table = comparison_table(compare(before, after), groups=list(found.values()))
    assert "Significant losses: none among 2 headline metrics by group, and no verdict on 1" in table
    line = next(line for line in result_table(after).splitlines() if line.startswith("    mate"))
    assert line.split() == ["mate", "1", "0.0", "too", "few", "(1)"]


def test_what_is_rare_rests_on_the_few_that_have_it(both: tuple[Item, Item], rows: list[dict[str, Any]]) -> None:
    """Forty rows, three of which end the game: recall rests on three, exactness on forty."""
    mates = [
        replace(item, game=f"mate {n}") for n, item in enumerate(score(rows[1:2] * 3, [rows[1]["target"]] * 3)[0].items)
    ]
    whole = of_games(both, [1] * 37, range(37))
    whole = measured([*whole[0].items, *mates])
    found = whole[0].estimates()
    recall, exact = found["terminated_recall"], found["exact"]
    assert (recall["value"], recall["clusters"], recall["ci_low"]) == (1.0, 3, None)
    assert (exact["clusters"], exact["ci_low"]) == (40, pytest.approx(40 / (40 + Z2)))
    assert pick(compare(whole, whole), "terminated_recall")["clusters"] == 3


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, Z2 / (12 + Z2)), (1, 12 / (12 + Z2), 1.0)])
def test_where_all_games_agree_wilsons_interval_is_over_games(
    both: tuple[Item, Item], right: int, low: float, high: float
) -> None:
    """Sixty rows of twelve games: 0 or 12 of 12, not of 60, and not [0, 0]."""
    whole = of_games(both, [right] * 60, np.arange(60) % 12)
    found = whole[0].estimates()["exact"]
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high))


def test_a_rating_of_few_games_has_no_interval() -> None:
    games = [("a", "b", 1.0), ("a", "b", 0.0), ("a", "b", 0.0)]
    few, enough = rate(games * 3, "b")["a"], rate([*games * 3, games[0]], "b")["a"]
    assert (few.ci_low, few.ci_high) == (None, None)
    assert enough.ci_low is not None
