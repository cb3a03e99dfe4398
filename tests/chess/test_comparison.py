"""Before against after: differences by hand, pairing enforced."""

from dataclasses import replace
from typing import Any

import pytest

from rookworld_trl.chess.accuracy import score
from rookworld_trl.measuring import Comparison, Result, compare

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
