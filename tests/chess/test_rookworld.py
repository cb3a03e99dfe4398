"""Rows as the public data has them: what is corrected, what is left out, and that both are counted."""

import json
from pathlib import Path
from typing import Any

import chess
import pytest

from rookworld_trl.chess.dataset import Report
from rookworld_trl.chess.rookworld import convert_rows
from rookworld_trl.chess.sources import FEATURES, DataOptions, load_prompts

START = chess.STARTING_FEN
# King and pawn against king; by hand, White has Kb1, a3, a4, and Black in the mirrored position Kb8, a6, a5.
WHITE, BLACK = "8/8/8/8/8/2k5/P7/K7 w - - 0 1", "k7/p7/2K5/8/8/8/8/8 b - - 0 1"
AFTER_E4 = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"
AFTER_E5_PUSHED = "rnbqkbnr/pppppppp/8/4P3/8/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"  # board.push(e2e5), which is illegal


def padded(fen: str, moves: str, evals: str, best: str) -> str:
    return f"P: {fen:90}M: {moves:30}E: {evals:40}B: {best}"


WHITE_ROW = padded(WHITE, "a2a4 a2a3 a1b1", "0.05 0.0 -0.1", "a2a4")
LEGAL = f"{START}+e2e4+e2e4+{AFTER_E4}+0.001+0+0"
ILLEGAL = f"{START}+e2e5+e2e5+{START}+-1.0+0+1"
MISLABELLED = f"{START}+e2e5+e2e5+{AFTER_E5_PUSHED}+0.001+0+0"


def convert(*texts: Any) -> tuple[list[dict[str, Any]], Report]:
    report = Report()
    return list(convert_rows([{"text": text} for text in texts], report)), report


def test_a_padded_row_is_split_behind_the_fen_and_keeps_its_padding() -> None:
    (row,), report = convert(WHITE_ROW)
    assert row["prompt"] == f"P: {WHITE}"
    assert row["prompt"] + row["target"] == WHITE_ROW
    assert (row["task"], row["stratum"]) == ("policy", "endgame")
    assert (row["legal_moves"], row["legal_cp"]) == ([], []), "engines value them"
    assert report.counts == {"rows read": 1, "P: rows kept": 1}


def test_rows_without_prefix_are_environment_rows() -> None:
    bare, prefixed = convert(LEGAL, "A: " + LEGAL)[0]
    assert bare == prefixed
    assert bare["prompt"] == f"A: {START}+e2e4+e2e4+"
    assert bare["target"] == f"{AFTER_E4}+0.001+0+0"
    assert (bare["task"], bare["stratum"], bare["legal_moves"]) == ("environment", "quiet", [])


def test_answers_are_python_chess_s_and_what_was_wrong_is_counted() -> None:
    rows, report = convert(ILLEGAL, MISLABELLED, LEGAL, LEGAL.replace("+0.001+0+0", "+0.5+1+0"))
    assert [row["target"] for row in rows] == [f"{START}+-1.0+0+1"] * 2 + [f"{AFTER_E4}+0.001+0+0"] * 2
    assert report.counts == {
        "rows read": 4,
        "A: rows kept": 4,
        "A: rows of illegal moves": 2,
        "A: rows of illegal moves labelled as if they were legal, and corrected": 1,
        "A: rows of legal moves corrected": 1,
    }


MALFORMED = {
    "A: prompt": [None, "a line of something else"],
    "A: fields": [f"{START}+e2e4+e2e4+{AFTER_E4}+0.001"],
    "A: reward": [f"{START}+e2e4+e2e4+{AFTER_E4}+much+0+0"],
    "A: fen": [f"8/8/8/8/8/8/8/K7 w - - 0 1+a1a2+a1a2+{AFTER_E4}+0.001+0+0"],
    "P: fen": ["P: 8/8/8 w - - 0 1"],
    "P: sections": [f"P: {START:90}M: e2e4 B: e2e4"],
    "P: moves": [padded(START, "e4", "0.3", "e2e4")],
    "P: candidates": [padded(START, "e2e5 d2d4", "0.3 0.2", "d2d4"), padded(START, "e2e4 e2e4", "0.3 0.2", "e2e4")],
    "P: evals": [padded(START, "e2e4 d2d4", "0.3", "e2e4")],
}


def test_malformed_rows_are_left_out_and_counted_by_reason() -> None:
    rows, report = convert(WHITE_ROW, *(text for texts in MALFORMED.values() for text in texts), LEGAL)
    assert [row["task"] for row in rows] == ["policy", "environment"]
    counted = {f"malformed, {reason}": len(texts) for reason, texts in MALFORMED.items()}
    assert report.counts == counted | {"rows read": 13, "P: rows kept": 1, "A: rows kept": 1}
    assert "2 malformed, P: candidates (first: row 9, 'P: rnbq" in str(report)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [LEGAL, MISLABELLED, "P: nothing"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return str(path)


def test_a_text_column_becomes_prompts_with_the_report_shown(texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_prompts(texts)
    assert dataset.features == FEATURES
    assert list(dataset["task"]) == ["environment", "environment"]
    shown = capsys.readouterr().out
    for line in ("3 rows read", "2 A: rows kept", "1 malformed, P: fen", "1 A: rows of illegal moves labelled as if"):
        assert line in shown


def test_nothing_is_guessed(tmp_path: Path) -> None:
    """Of the moves that a `P:` row lists there are evals, of the others none."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (LEGAL, WHITE_ROW)))
    with pytest.raises(ValueError, match=r"rows.jsonl row 1, column 'text'.*`best_move: engine`"):
        load_prompts(str(path))


def test_a_stream_gives_the_same_rows(texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    streamed = load_prompts(texts, options=DataOptions(streaming=True, max_rows=100))
    whole = load_prompts(texts)
    assert streamed.features == whole.features
    assert sorted(streamed["prompt"]) == sorted(whole["prompt"])
    load_prompts(texts, options=DataOptions(streaming=True, max_rows=2))
    assert "2 rows read" in capsys.readouterr().out
    assert len(load_prompts(texts, options=DataOptions(max_rows=1))) == 1


def test_many_rows_are_read_in_chunks(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_prompts(texts)
    monkeypatch.setattr("rookworld_trl.chess.sources.CHUNK", 1)
    chunked = load_prompts(texts)
    assert chunked.features == FEATURES
    assert chunked.to_list() == whole.to_list()
