"""The count of illegal moves and crashes: nought for the engine itself, and seen where there are some."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.uci_games import RESULTS, engine_command, play_by_python_chess, play_by_xboard, read_match

# Plays the first legal move, but cheats or ends in its third one.
FAULTY = """
import sys, chess
board, count = chess.Board(), 0
for line in sys.stdin:
    words = line.split()
    if words[0] == "uci":
        print("id name faulty\\noption name Temperature type spin default 0 min 0 max 200")
        print("option name Retries type spin default 0 min 0 max 9\\noption name Seed type spin default 0 min 0 max 99")
        print("uciok", flush=True)
    elif words[0] == "isready":
        print("readyok", flush=True)
    elif words[0] == "position":
        board = chess.Board()
        for move in words[3:]:
            board.push_uci(move)
    elif words[0] == "go":
        count += 1
        if count == 3 and sys.argv[1] == "crash":
            sys.exit(3)
        move = "a1h8" if count == 3 else next(iter(board.legal_moves)).uci()
        print("bestmove", move, flush=True)
    elif words[0] == "quit":
        break
"""


def test_the_engine_plays_whole_games() -> None:
    played = play_by_python_chess(engine_command("nano"), games=2, max_plies=16)
    assert (played["illegal_moves"], played["crashes"], played["faults"]) == (0, 0, [])
    assert played["moves"] == 16
    assert played["ended"] == {"ply limit": 2}


@pytest.mark.parametrize(("fault", "counted"), [("illegal", "illegal_moves"), ("crash", "crashes")])
def test_faults_are_counted_and_the_next_game_is_played(fault: str, counted: str, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    played = play_by_python_chess([sys.executable, str(script), fault], games=2, max_plies=8)
    other: dict[str, Any] = {"illegal_moves": 0, "crashes": 0}
    assert {name: played[name] for name in other} == {**other, counted: 2}
    assert len(played["faults"]) == 2


def test_xboards_games_are_judged(tmp_path: Path) -> None:
    pgn = tmp_path / "games.pgn"
    mate = '[White "rookworld-uci"]\n[Black "x"]\n[Result "0-1"]\n\n'
    mate += "1. f3 e5 2. g4 Qh4# {Xboard adjudication: Checkmate} 0-1\n"
    lost = '[White "x"]\n[Black "rookworld-uci"]\n[Result "1-0"]\n\n1. f3 {Black forfeits on illegal move} 1-0\n'
    pgn.write_text(f"{mate}\n{lost}")
    found = read_match(pgn)
    assert (found["games"], found["moves"], found["results"]) == (2, 2, {"0-1": 1, "1-0": 1})
    assert found["faults"] == ["game 2: Black forfeits on illegal move"]


def test_without_xboard_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was started"))
    with pytest.raises(FileNotFoundError, match="apt-get install xboard polyglot xvfb stockfish"):
        play_by_xboard(["engine"], 1)


def test_the_page_tells_what_was_measured() -> None:
    root = RESULTS.parents[2]
    measured = json.loads(RESULTS.read_text())
    played, match = measured["python-chess"], measured["xboard"]
    assert (played["games"], played["illegal_moves"], played["crashes"], match["faults"]) == (100, 0, 0, [])
    told = " ".join((root / "docs" / "uci.md").read_text().split())
    assert (
        f"100 games of at most {played['max_plies']} plies in python-chess, {played['moves']} moves, 0 illegal" in told
    )
    assert f"{match['games']} games in XBoard, {match['moves']} moves, 0 faults" in told
