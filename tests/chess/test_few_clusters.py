"""Few games, or few items: no interval and no verdict below ten, honest rates of false alarms from there on."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rookworld_trl.chess.accuracy import HEADLINES, METRICS, score
from rookworld_trl.measuring import (
    Comparison,
    Item,
    Result,
    against,
    compare,
    compare_groups,
    comparison_table,
    overview,
    result_table,
)
from rookworld_trl.measuring.elo import rate
from rookworld_trl.measuring.metrics import mean, ratio, share
from rookworld_trl.reports.card import write_card
from rookworld_trl.reports.document import write_report
from rookworld_trl.reports.summary import write_summary
from tests.reports.test_card import SUMMARY
from tests.support.pages import read_page

SETTINGS = {"temperature": 1.0, "max_new_tokens": 99, "seed": 0}
Z2 = 1.959964**2


@pytest.fixture
def both(rows: list[dict[str, Any]]) -> tuple[Item, Item]:
    """An `A:` item answered wrong, and answered right."""
    wrong, right = (score(rows[:1], [text])[0].items[0] for text in ("?", rows[0]["target"]))
    return wrong, right


def measured(items: list[Item]) -> list[Result]:
    return [Result("environment", METRICS["environment"], items, "greedy", SETTINGS, HEADLINES["environment"])]


def evaluation(both: tuple[Item, Item], right: Any, games: Any) -> list[Result]:
    return measured([replace(both[bool(ok)], game=str(game)) for ok, game in zip(right, games, strict=True)])


def pick(rows: list[Comparison], metric: str) -> Comparison:
    return next(row for row in rows if row["metric"] == metric)


@pytest.mark.parametrize("games", [1, 2, 5, 9, 10, 12, 20])
def test_two_models_without_a_difference_are_rarely_told_apart(both: tuple[Item, Item], games: int) -> None:
    """Sixty rows in so many games, 400 times: about one verdict in twenty, and none below ten games.

    A game's rows are alike: each game has its own chance of a right answer, of each model.
    """
    rng, of_row, significant = np.random.default_rng(games), np.arange(60) % games, 0
    for _ in range(400):
        chances = rng.beta(1, 1, (2, games))
        before, after = (evaluation(both, rng.random(60) < chance[of_row], of_row) for chance in chances)
        (found,) = compare(before, after, only=["exact"])
        significant += found["significant"]
        assert (found["ci_low"] is None) == (games < 10)
        assert found["clusters"] == games
    assert significant == 0 if games < 10 else 0.02 <= significant / 400 <= 0.075


def test_a_stratum_of_one_item_has_no_verdict(both: tuple[Item, Item]) -> None:
    """It was right before and is wrong after: that was shown as -100.0 [-100.0, -100.0], a significant loss."""
    before = evaluation(both, [1] * 13, range(13))
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


def test_few_items_are_as_few_games(both: tuple[Item, Item]) -> None:
    nine, ten = (evaluation(both, [0] * n, [""] * n) for n in (9, 10))
    assert nine[0].estimates()["exact"]["ci_high"] is None
    assert ten[0].estimates()["exact"]["ci_high"] == pytest.approx(Z2 / (10 + Z2))
    won = evaluation(both, [1] * 9, [""] * 9)
    (row,) = compare(nine, won, only=["exact"])
    assert (row["difference"], row["ci_low"], row["significant"]) == (1.0, None, False)
    for table in (comparison_table(compare(nine, won)), result_table(won)):
        assert "too few (9)" in table
        assert table.splitlines()[-1].startswith("too few (n): fewer than 10 games")
        assert "[" not in table
        assert max(map(len, table.splitlines())) <= 100
    for table in (comparison_table(compare(ten, ten)), result_table(ten)):
        assert "[" in table


def test_what_is_rare_rests_on_the_few_that_have_it(both: tuple[Item, Item], rows: list[dict[str, Any]]) -> None:
    """Forty rows, three of which end the game: recall rests on three, exactness on forty."""
    mates = [
        replace(item, game=f"mate {n}") for n, item in enumerate(score(rows[1:2] * 3, [rows[1]["target"]] * 3)[0].items)
    ]
    whole = evaluation(both, [1] * 37, range(37))
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
    whole = evaluation(both, [right] * 60, np.arange(60) % 12)
    found = whole[0].estimates()["exact"]
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high))


def test_where_nothing_changed_a_change_can_still_not_be_ruled_out(both: tuple[Item, Item]) -> None:
    half = evaluation(both, np.arange(60) % 2, np.arange(60) % 12)
    (same,) = compare(half, half, only=["exact"])
    assert (same["ci_low"], same["ci_high"]) == pytest.approx((-Z2 / (12 + Z2), Z2 / (12 + Z2)))
    none, every = (evaluation(both, [right] * 60, np.arange(60) % 12) for right in (0, 1))
    (risen,) = compare(none, every, only=["exact"])
    assert (risen["ci_low"], risen["ci_high"], risen["significant"]) == (pytest.approx(1 - Z2 / (12 + Z2)), 1.0, True)
    (fallen,) = compare(every, none, only=["exact"])
    assert (fallen["ci_low"], fallen["loss"]) == (-1.0, True)


def suite(values: list[float], games: list[str]) -> Result:
    groups = {"group": "theme"}
    items = [
        Item(f"{n}", {"solved": value, "positions": 1.0, "plies": 80.0}, groups=groups, game=game)
        for n, (value, game) in enumerate(zip(values, games, strict=True))
    ]
    metrics = [share("solved", "solved"), ratio("solved", "of positions", "positions"), mean("plies", "plies", ".1f")]
    return Result("suite", metrics, items, "greedy")


def test_suites_and_their_groups_claim_nothing_over_few_games() -> None:
    games = [f"{n % 4}" for n in range(40)]
    lost, won = suite([0.0] * 40, games), suite([1.0] * 40, games)
    assert {(e["ci_low"], e["clusters"]) for e in won.estimates().values()} == {(None, 4)}
    assert won.to_dict()["groups"]["group=theme"]["metrics"]["solved"]["ci_low"] is None
    written = json.loads(json.dumps(lost.to_dict(), allow_nan=False))
    rows, _ = against([won], {("suite", "greedy"): written})
    assert [(row["significant"], row["ci_low"]) for row in rows] == [(False, None)] * 3
    assert result_table([won]).count("too few (4)") == 4
    assert "| 100.0, too few (4) |" in overview({"m": [won]})
    ratio_of_all = suite([1.0] * 20, [""] * 20).estimates()["solved"]
    assert ratio_of_all["ci_low"] == pytest.approx(20 / (20 + Z2))
    plies = suite([1.0] * 40, [f"{n % 20}" for n in range(40)]).estimates()["plies"]
    assert (plies["ci_low"], plies["ci_high"]) == (80.0, 80.0), "a count is no share"


def test_a_rating_of_few_games_has_no_interval() -> None:
    games = [("a", "b", 1.0), ("a", "b", 0.0), ("a", "b", 0.0)]
    few, enough = rate(games * 3, "b")["a"], rate([*games * 3, games[0]], "b")["a"]
    assert (few.ci_low, few.ci_high) == (None, None)
    assert enough.ci_low is not None


def test_reports_and_cards_say_so_too(both: tuple[Item, Item], tmp_path: Path) -> None:
    before, after = evaluation(both, [1] * 9, range(9)), evaluation(both, [0] * 9, range(9))
    (tmp_path / "checkpoint").mkdir()
    facts = {
        name: value for name, value in SUMMARY.items() if name not in ("command", "versions", "headline", "metrics")
    }
    groups = compare_groups(before, after)
    write_summary(tmp_path, comparison=compare(before, after), seconds={}, groups=groups, **facts)
    assert json.loads((tmp_path / "summary.json").read_text())["losses"] == []
    card = write_card(tmp_path, tmp_path / "checkpoint").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| environment | exact | greedy"))
    assert "| 100.0 | 0.0 | -100.0, too few (9) |" in row
    losses = card[card.index("### Significant losses") :]
    assert re.search(r"None among 0 metrics, and no verdict on \d+\.", losses)
    text = read_page(write_report(tmp_path)).text
    assert "-100.0, too few (9)" in text
    assert "Significant losses: none among 0 metrics, and no verdict on" in text
