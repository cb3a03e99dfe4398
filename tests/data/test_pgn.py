"""A user's games: one `A:` row a move, `P:` rows by an engine, and games that cannot be used counted."""

from pathlib import Path

import chess
import pytest

from rookworld_trl.data.pgn import GamesReport, rows_of_games
from rookworld_trl.data.sources import FEATURES, load_prompts

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


@pytest.fixture
def pgn(tmp_path: Path) -> Path:
    path = tmp_path / "games.pgn"
    path.write_text(GAMES)
    return path


def test_each_move_is_a_row(pgn: Path) -> None:
    report = GamesReport()
    rows = list(rows_of_games(pgn, report))
    assert [row["prompt"].split("+")[1] for row in rows] == ["f2f3", "e7e5", "g2g4", "d8h4"]
    assert rows[-1]["prompt"].endswith("+d8h4+f2f3 e7e5 g2g4 d8h4+")
    assert (rows[-1]["target"], rows[-1]["stratum"]) == (f"{MATED}+1.0+1+0", "mate")
    assert (report.games, report.cut, report.repeated, report.kept["environment"]) == (4, 1, 2, 4)
    assert report.skipped == {"a chess variant": 1, "no moves": 1}


@pytest.mark.parametrize("null", ["--", "Z0"])
def test_a_game_ends_before_a_null_move(tmp_path: Path, null: str) -> None:
    path = tmp_path / "annotated.pgn"
    path.write_text(f"1. e4 e5 2. {null} Nc6 3. Nf3 *\n")
    report = GamesReport()
    assert [row["prompt"].split("+")[1] for row in rows_of_games(path, report)] == ["e2e4", "e7e5"]
    assert report.cut == 1


def test_each_position_is_a_row_too_for_an_engine_to_value(pgn: Path) -> None:
    report = GamesReport()
    rows = [row for row in rows_of_games(pgn, report, positions=True) if row["task"] == "policy"]
    assert rows[0]["prompt"] == f"P: {chess.STARTING_FEN}"
    assert len({row["prompt"] for row in rows}) == len(rows) == report.kept["policy"] == 4
    assert all((row["target"], row["legal_moves"]) == ("", []) for row in rows)


def test_a_pgn_is_a_data_set(pgn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_prompts(str(pgn))
    assert dataset.features == FEATURES
    assert len(dataset) == 4
    shown = capsys.readouterr().out
    assert "4 games: 0 P: and 4 A: rows" in shown
    assert "`best_move: engine` makes them" in shown
    with pytest.raises(ValueError, match=r"gone\.pgn: no such file"):
        load_prompts(str(pgn.with_name("gone.pgn")))
    pgn.write_text("")
    with pytest.raises(ValueError, match="has no rows that can be used"):
        load_prompts(str(pgn))
