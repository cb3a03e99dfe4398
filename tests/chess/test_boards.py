"""The boards of held-out items, from evaluations that the package writes itself."""

import re
from pathlib import Path

import chess
import pytest

from rookworld_trl.chess import accuracy
from rookworld_trl.chess.accuracy import score
from rookworld_trl.chess.boards import ILLEGAL, VALUES, WRONG, Card, gallery
from rookworld_trl.measuring import write_results
from rookworld_trl.reports.run import read_run
from tests.support.runs import AFTER, BEFORE, MATE, RIGHT, ROWS, SETTINGS, START, policy_row, write_evaluation


@pytest.fixture
def cards(tmp_path: Path) -> dict[str, Card]:
    write_evaluation(tmp_path, "before", BEFORE)
    write_evaluation(tmp_path, "after", AFTER)
    return {card.texts[0][1][0][0]: card for card in cards_of(tmp_path)}


def cards_of(folder: Path) -> list[Card]:
    run = read_run(folder)
    return gallery(run.name, run.evaluations)


def pieces(elements: str) -> int:
    return len(re.findall(r'<use href="#(?:white|black)-', elements))


def test_evaluation_keeps_what_boards_need(tiny_model, tiny_tokenizer) -> None:
    results = accuracy.evaluate(tiny_model, tiny_tokenizer, ROWS, modes=["greedy"], max_new_tokens=4)
    start, mate, right = (item.reference for result in results for item in result.items)
    assert (right, len(start), mate["a1a8"]) == (RIGHT, 20, 1.0)
    # Win chance of 500 centipawns is 1 / (1 + exp(-1.841)) = 0.863, of 0 it is 0.5.
    assert start["e2e4"] == 1.0
    assert start["d2d4"] == pytest.approx(1 - 0.363, abs=6e-4)


def test_candidates_are_arrows_coloured_by_value(cards) -> None:
    card = cards[f"P: {START}"]
    before, after = card.boards
    assert (before.caption, after.caption) == ("before: d2d4, value 0.64; best e2e4", "after: e2e4, value 1.00")
    assert pieces(before.elements) == 32
    best, bad = VALUES[0][1], VALUES[-1][1]
    assert before.elements.count(f"{bad}CC") == 2  # a line and its head
    assert best not in before.elements
    assert after.elements.count(f"{best}CC") == after.elements.count(f"{bad}CC") == 2
    assert {"improved", "random"} == set(card.kinds)


def test_illegal_moves_and_nonsense_are_drawn_as_such(cards) -> None:
    before, after = cards[f"P: {MATE}"].boards
    assert before.caption == "before: a1b2, illegal; best a1a8"
    assert before.elements.count(f"{ILLEGAL}CC") == 2, "a1a9 is no move, a1b2 is drawn"
    assert after.caption == "after: no move; best a1a8"
    assert "<line" not in after.elements


def test_predicted_stands_beside_true_with_wrong_squares_marked(cards) -> None:
    card = cards[ROWS[2]["prompt"]]
    right, before, after = card.boards
    assert [board.caption for board in card.boards] == ["right, after e2e4", "before: 2 wrong squares", "after: exact"]
    assert before.elements.count(WRONG) == 2  # e2 and e4
    assert WRONG not in right.elements + after.elements
    texts = dict(card.texts)
    wrong = [word for word, marked in texts["before"] if marked]
    assert wrong == ["rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR ", "w "]
    assert not any(marked for _, marked in texts["after"])


def test_black_sees_its_own_side(tmp_path: Path) -> None:
    board = chess.Board()
    board.push_uci("e2e4")
    row = policy_row(board.fen(), "e7e5")
    written = score([row], [" M: e7e5 E: 0.0 B: e7e5"], settings=SETTINGS)
    write_results(tmp_path / "evaluation_before.parquet", written)
    assert cards_of(tmp_path) == [], "nothing to compare with yet"
    write_results(tmp_path / "evaluation_after.parquet", written)
    (card,) = cards_of(tmp_path)
    assert card.boards[0].flipped
    assert card.kinds == ("random",), "neither better nor worse"
