"""A user's games: one `A:` row a move, `P:` rows by an engine, and games that cannot be used counted."""

import gzip
import random
from pathlib import Path

import chess
import pytest

from rookworld_trl.chess.dataset import Report
from rookworld_trl.chess.pgn import rows_of_games
from rookworld_trl.chess.sources import FEATURES, load_prompts

GAMES = """[Event "Fool's mate"]

1. f3 {careless} e5 2. g4 (2. e4 Nf6) Qh4# 0-1

[Event "The same start, then an illegal move"]

1. f3 e5 2. Ke3 Nc6 *

[Variant "Crazyhouse"]

1. e4 e5 *

[Event "Nothing played"]

*
"""
MATED = "rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3"
NOT_CHESS = "games skipped: they do not begin from a legal position of standard chess"
CUT = "games used up to their first null, illegal or unreadable move"


@pytest.fixture
def pgn(tmp_path: Path) -> Path:
    path = tmp_path / "games.pgn"
    path.write_text(GAMES)
    return path


def read(path: Path, text: str) -> tuple[list[str], Report]:
    """Moves and report of a file with this text."""
    path.write_text(text)
    report = Report()
    return [row["prompt"].split("+")[1] for row in rows_of_games(path, report)], report


def test_each_move_is_a_row(pgn: Path) -> None:
    report = Report()
    rows = list(rows_of_games(pgn, report))
    assert [row["prompt"].split("+")[1] for row in rows] == ["f2f3", "e7e5", "g2g4", "d8h4"]
    assert rows[-1]["prompt"].endswith("+d8h4+f2f3 e7e5 g2g4 d8h4+")
    assert {row["game"] for row in rows} == {"1"}
    assert (rows[-1]["target"], rows[-1]["stratum"]) == (f"{MATED}+1.0+1+0", "mate")
    counted = {"games": 4, CUT: 1, "moves from positions seen before": 2, "A: rows": 4, NOT_CHESS: 1}
    assert report.counts == counted | {"games skipped: no move can be read": 1}


def test_each_position_is_a_row_too_for_an_engine_to_value(pgn: Path) -> None:
    report = Report()
    rows = [row for row in rows_of_games(pgn, report, positions=True) if row["task"] == "policy"]
    assert rows[0]["prompt"] == f"P: {chess.STARTING_FEN}"
    assert len({row["prompt"] for row in rows}) == len(rows) == report.counts["P: rows"] == 4
    assert all((row["target"], row["legal_moves"]) == ("", []) for row in rows)


def test_a_pgn_is_a_data_set(pgn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_prompts(str(pgn))
    assert dataset.features == FEATURES
    assert len(dataset) == 4
    shown = capsys.readouterr().out
    assert f"{pgn}: {dataset.info.description}\n" in shown
    assert f"1 {NOT_CHESS}" in dataset.select([0]).info.description
    assert "4 games\n4 A: rows\n" in shown
    assert "`best_move: engine` makes them" in shown
    with gzip.open(pgn.with_name("GAMES.PGN.gz"), "wt") as file:
        file.write(GAMES)
    assert len(load_prompts(str(pgn.with_name("GAMES.PGN.gz")))) == 4
    with pytest.raises(ValueError, match=r"gone\.pgn': there is no such file"):
        load_prompts(str(pgn.with_name("gone.pgn")))
    pgn.write_text("\n")
    with pytest.raises(ValueError, match="has no rows that can be used"):
        load_prompts(str(pgn))


# No empty line between a game and the next one's tags.
RUN_TOGETHER = """[Event "Live Chess"]
[Site "Chess.com (rapid :)"]

1. e4 {[%clk 0:09:58.1]} e5 {[%clk
0:09:57]} 2. Nf3 1-0
[Event "Live Chess"]
[Variant "Chess960"]
[FEN "bbqnnrkr/pppppppp/8/8/8/8/PPPPPPPP/BBQNNRKR w HFhf - 0 1"]

1. e4 e5 0-1
[Event "From a position"]
[SetUp "1"]
[FEN "8/8/8/8/8/2k5/P7/K7 w - - 0 1"]

1. a4 Kc4 *
"""


def test_games_without_an_empty_line_between_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moves, report = read(tmp_path / "chess_com.pgn", RUN_TOGETHER)
    assert moves == ["e2e4", "e7e5", "g1f3", "a2a4", "c3c4"]
    assert report.counts == {"games": 3, "A: rows": 5, NOT_CHESS: 1}
    assert capfd.readouterr().err == ""


START = ["e2e4", "e7e5"]


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("1. e4 e5 *\n\n1. d4 d5 *\n", [*START, "d2d4", "d7d5"]),  # games without tags
        ('[Event "a"]\n[Result "*"]\n\n[Event "b"]\n\n1. e4 *\n', ["e2e4"]),  # a game without moves
        ('\ufeff[Event "a"]\r\n\r\n1. e4\r\n% nothing\r\ne5 *\r\n', START),  # Windows' line ends, escaped lines
        (
            "1. e4! $14 {[%eval 0.3]} 1... e5?? ({no} 1... c5 (1... d5 2. exd5) 2. a3) 2. g1f3 ; d6\n*\n",
            [*START, "g1f3"],
        ),
        ("1. e4 e5 2. -- Nc6 3. Nf3 *\n", START),  # a null move
        ("1. e4 e5 2. Sf3 Sc6 3. Lb5 a6 *\n", []),  # German
        ("1. e4 e5 2. Кf3 Кc6 3. Сb5 *\n", []),  # Russian
        ("1. e4 e5 2. ♘f3 ♞c6 *\n", []),  # figurines
    ],
)
def test_games_end_where_they_end_and_no_word_becomes_another_move(tmp_path: Path, text: str, moves: list[str]) -> None:
    assert read(tmp_path / "games.pgn", text)[0] == moves


def test_nothing_is_read_behind_an_unreadable_move(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moves, report = read(tmp_path / "cut.pgn", "1. e4 Ke5 2. d4 d5 2... a6 *\n\n1. c4 Qxh8 *\n")
    assert moves == ["e2e4", "c2c4"]
    assert f"2 {CUT} (first: game 1, illegal san: 'Ke5'" in str(report)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("variant", ["Crazyhouse", "Antichess", "Chess960", "No such chess"])
def test_a_variant_is_never_played_by_the_rules_of_chess(tmp_path: Path, variant: str) -> None:
    moves, report = read(tmp_path / "variant.pgn", f'[Variant "{variant}"]\n\n1. e4 e5 *\n')
    assert (moves, report.counts) == ([], {"games": 1, NOT_CHESS: 1})


def test_random_bytes_are_no_games(tmp_path: Path) -> None:
    path = tmp_path / "binary.pgn"
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(5000))
        with pytest.raises(ValueError, match=r"binary\.pgn line \d+: is no text"):
            load_prompts(str(path))
    for seed in range(50):  # and no text whatever ends in a traceback
        text = "".join(random.Random(seed).choices('[]{}();"$%*.?! \n01-/=+#OKQRBNPabcdefgh12345678xEvent²', k=2000))
        read(path, text)
