"""Rows as the public data has them: what is repaired, what is left out, and that both are counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import chess
import pytest
from datasets import Dataset

from rookworld_trl.chess import policy
from rookworld_trl.chess.dataset import SPLITS, positions_of, split_dataset, split_of
from rookworld_trl.chess.rewards.environment_score import score_environment
from rookworld_trl.chess.rewards.policy_score import score_policy
from rookworld_trl.chess.rookworld import Report, centipawns, convert_rows
from rookworld_trl.chess.sources import FEATURES, DataOptions, load_prompts

START = chess.STARTING_FEN
# King and pawn against king; by hand, White has Kb1, a3, a4, and Black in the mirrored position Kb8, a6, a5.
WHITE, BLACK = "8/8/8/8/8/2k5/P7/K7 w - - 0 1", "k7/p7/2K5/8/8/8/8/8 b - - 0 1"
AFTER_E4 = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"
AFTER_E5_PUSHED = "rnbqkbnr/pppppppp/8/4P3/8/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"  # board.push(e2e5), which is illegal


def padded(fen: str, moves: str, evals: str, best: str) -> str:
    return f"P: {fen:90}M: {moves:30}E: {evals:40}B: {best}"


WHITE_ROW = padded(WHITE, "a2a4 a2a3 a1b1", "0.05 0.0 -0.1", "a2a4")
BLACK_ROW = padded(BLACK, "a7a5 a7a6 a8b8", "0.05 0.0 -0.1", "a8b8")  # its last, which is its worst
LEGAL = f"{START}+e2e4+e2e4+{AFTER_E4}+0.001+0+0"
ILLEGAL = f"{START}+e2e5+e2e5+{START}+-1.0+0+1"
MISLABELLED = f"{START}+e2e5+e2e5+{AFTER_E5_PUSHED}+0.001+0+0"


def convert(*texts: Any, **options: Any) -> tuple[list[dict[str, Any]], Report]:
    report = Report()
    return list(convert_rows([{"text": text} for text in texts], report, **options)), report


def test_a_padded_row_is_split_behind_the_fen_and_keeps_its_padding() -> None:
    (row,), report = convert(WHITE_ROW)
    assert row["prompt"] == f"P: {WHITE}"
    assert row["prompt"] + row["target"] == WHITE_ROW
    assert (row["task"], row["stratum"]) == ("policy", "endgame")
    assert dict(zip(row["legal_moves"], row["legal_cp"], strict=True)) == {"a1b1": -10, "a2a3": 0, "a2a4": 5}
    assert (report.read, report.kept, report.best_repaired) == (1, Counter(policy=1), 0)


@pytest.mark.parametrize(
    ("text", "best"),
    [
        (BLACK_ROW, "a7a5"),  # the best of its evals
        (padded(WHITE, "a2a4 a2a3 a1b1", "0.0 0.0 -0.1", "a2a3"), "a2a3"),  # among equals
        (padded(START, "e2e4 d2d4", "0.3 0.2", "a2a3"), "e2e4"),  # no candidate
    ],
)
def test_the_best_move_is_the_best_of_the_evals(text: str, best: str) -> None:
    (row,), report = convert(text)
    assert row["prompt"] + row["target"] == text[:-4] + best
    assert report.best_repaired == (text[-4:] != best)
    if text is BLACK_ROW:
        scores = [
            score_policy(each, row["legal_moves"], row["legal_cp"])
            for each in (row["target"], text[len(row["prompt"]) :])
        ]
        assert scores[0].reward == 1.0 > scores[1].reward


def test_moves_that_the_row_does_not_list_are_worth_a_pawn_less_than_its_worst() -> None:
    (row,), _ = convert(padded(START, "e2e4 d2d4 g1f3 c2c4 e2e3", "0.36 0.31 0.3 0.25 0.2", "e2e4"))
    values = dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
    assert len(values) == 20
    assert (values["e2e4"], values["e2e3"], values["a2a3"]) == (36, 20, -80)
    assert row["legal_moves"] == sorted(row["legal_moves"])


@pytest.mark.parametrize(
    ("evals", "unlisted"),
    [
        ("999.98 999.97 999.97 999.96 999.96", 799),  # win chance 0.95: no mate, and no small loss
        ("15.0 14.0 13.0 12.0 11.0", 714),  # 0.93287, of 0.98287
        ("-11.0 -12.0 -13.0 -14.0 -15.0", -10_000),  # nothing left to lose
    ],
)
def test_such_moves_lose_five_points_of_win_chance_at_least(evals: str, unlisted: int) -> None:
    (row,), _ = convert(padded(START, "e2e4 d2d4 g1f3 c2c4 e2e3", evals, "e2e4"))
    values = dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
    assert values["a2a3"] == unlisted
    completion = policy.format_completion(["a2a3", "e2e4", "d2d4", "g1f3", "c2c4"], evals.split(), "a2a3")
    score = score_policy(completion, row["legal_moves"], row["legal_cp"])
    assert score.level <= 3 or unlisted == -10_000


@pytest.mark.parametrize(
    ("pawns", "expected"),
    [(0.35, 35), (-12.34, -1234), (1000.0, 10_000), (999.98, 9_998), (-999.97, -9_997), (-1000.0, -10_000)],
)
def test_mates_stand_as_a_thousand_pawns(pawns: float, expected: int) -> None:
    assert centipawns(pawns) == expected


def test_for_an_engine_rows_come_without_values_and_as_they_are() -> None:
    (row,), report = convert(padded(START, "e2e4 d2d4", "0.3 0.2", "d2d4"), best_move="engine")
    assert row["legal_moves"] == row["legal_cp"] == []
    assert row["target"].endswith("B: d2d4")
    assert report.best_repaired == 0


def test_rows_without_prefix_are_environment_rows() -> None:
    bare, prefixed = convert(LEGAL, "A: " + LEGAL)[0]
    assert bare == prefixed
    assert bare["prompt"] == f"A: {START}+e2e4+e2e4+"
    assert bare["target"] == f"{AFTER_E4}+0.001+0+0"
    assert (bare["task"], bare["stratum"], bare["legal_moves"]) == ("environment", "quiet", [])


@pytest.mark.parametrize(
    ("option", "targets", "dropped"),
    [
        ("fix", [f"{START}+-1.0+0+1"] * 2, 0),
        ("keep", [f"{START}+-1.0+0+1", f"{AFTER_E5_PUSHED}+0.001+0+0"], 0),
        ("drop", [f"{START}+-1.0+0+1"], 1),
    ],
)
def test_illegal_moves_labelled_as_legal_are_found(option: str, targets: list[str], dropped: int) -> None:
    rows, report = convert(ILLEGAL, MISLABELLED, LEGAL, illegal=option)
    assert [row["target"] for row in rows[:-1]] == targets
    assert (report.illegal, report.mislabelled, report.dropped) == (2, 1, dropped)
    truthful = [score_environment(row["prompt"], row["target"], None).reward == 1.0 for row in rows]
    assert truthful.count(False) == (option == "keep")


def test_a_wrong_answer_to_a_legal_move_is_corrected_and_counted() -> None:
    (row,), report = convert(LEGAL.replace("+0.001+0+0", "+0.5+1+0"))
    assert row["target"] == f"{AFTER_E4}+0.001+0+0"
    assert report.corrected == 1


MALFORMED = {
    "no text": None,
    "A: prompt": "a line of something else",
    "A: fields": f"{START}+e2e4+e2e4+{AFTER_E4}+0.001",
    "A: reward": f"{START}+e2e4+e2e4+{AFTER_E4}+much+0+0",
    "A: fen": f"8/8/8/8/8/8/8/K7 w - - 0 1+a1a2+a1a2+{AFTER_E4}+0.001+0+0",
    "P: fen": "P: 8/8/8 w - - 0 1",
    "P: sections": f"P: {START:90}M: e2e4 B: e2e4",
    "P: moves": padded(START, "e4", "0.3", "e2e4"),
    "P: illegal candidate": padded(START, "e2e5 d2d4", "0.3 0.2", "d2d4"),
    "P: repeated candidate": padded(START, "e2e4 e2e4", "0.3 0.2", "e2e4"),
    "P: not one eval a move": padded(START, "e2e4 d2d4", "0.3", "e2e4"),
}


def test_malformed_rows_are_left_out_and_counted_by_reason() -> None:
    rows, report = convert(WHITE_ROW, *MALFORMED.values(), MALFORMED["P: moves"], LEGAL)
    assert [row["task"] for row in rows] == ["policy", "environment"]
    assert report.malformed == Counter({reason: 2 if reason == "P: moves" else 1 for reason in MALFORMED})
    assert report.read == len(MALFORMED) + 3
    assert report.examples["no text"] == (1, "None")
    shown = str(report)
    assert "12 malformed" in shown
    assert "malformed, P: moves: 2 (first: row 8" in shown


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [WHITE_ROW, BLACK_ROW, LEGAL, MISLABELLED, "P: nothing"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return str(path)


def test_values_of_unlisted_moves_are_guessed_by_an_explicit_key_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = padded(START, "e2e4 d2d4", "0.3 0.2", "e2e4")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (WHITE_ROW, LEGAL, row)))
    with pytest.raises(ValueError, match=r"rows.jsonl row 2, column 'text'.*`best_move: engine`.*`guess_unlisted"):
        load_prompts(str(path))
    guessed = load_prompts(str(path), options=DataOptions(guess_unlisted=True))
    assert [len(each) for each in guessed["legal_cp"]] == [3, 0, 20]


def test_a_text_column_becomes_prompts_with_the_report_shown(texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_prompts(texts)
    assert dataset.features == FEATURES
    assert list(dataset["task"]) == ["policy", "policy", "environment", "environment"]
    shown = capsys.readouterr().out
    assert "5 rows read: 2 P: and 2 A: kept, 1 malformed, 0 dropped" in shown
    assert "'B:' replaced by a better move of the row in 1" in shown
    assert "1 illegal moves, 1 of them labelled as if legal" in shown
    assert len(load_prompts(texts, options=DataOptions(illegal="drop"))) == 3


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
    monkeypatch.setattr("rookworld_trl.chess.sources.CHUNK", 3)
    chunked = load_prompts(texts)
    assert chunked.features == FEATURES
    assert chunked.to_list() == whole.to_list()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "P: nothing"}) + "\n")
    with pytest.raises(ValueError, match="has no rows that can be used"):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("options", "message"), [({"streaming": True}, "`streaming` is true"), ({"max_rows": 0}, "`max_rows` is 0")]
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_splits_share_no_position() -> None:
    board, rows = chess.Board(), []
    for ply in range(120):  # knights out and back again and a pawn on its way: positions repeat with other clocks
        move = list(board.legal_moves)[(ply * 7) % board.legal_moves.count()]
        after = board.copy()
        after.push(move)
        rows += [f"{board.fen()}+{move.uci()}+{move.uci()}+{after.fen()}+0.001+0+0"]
        rows += [padded(board.fen(), move.uci(), "0.0", move.uci())]
        board = after
        if board.is_game_over():
            break
    converted = Dataset.from_list(convert(*rows)[0])
    split = split_dataset(converted)
    shown = {
        name: {
            p
            for prompt, target in zip(part["prompt"], part["target"], strict=True)
            for p in positions_of(prompt, target)
        }
        for name, part in split.items()
    }
    assert all(shown[name] for name in SPLITS), "the sample is too small to tell"
    assert all(shown[a].isdisjoint(shown[b]) for a in SPLITS for b in SPLITS if a != b)
    assert all(split_of(position) == name for name in SPLITS for position in shown[name])
    assert sum(len(part) for part in split.values()) < len(converted), "rows across splits stay out"
