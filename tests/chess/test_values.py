"""`P:` rows without values: engines give them, a failed search costs its row only, and the answers are kept."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import chess
import pytest

from rookworld_trl.chess.engine import Engine, MoveValue, ValueCache
from rookworld_trl.chess.sources import DataOptions, ValuesReport, load_prompts, with_values
from tests.support.stockfish import requires_stockfish

START = chess.STARTING_FEN
MATE_IN_ONE = "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1"


class FixedPool:
    """Values every legal move: the later in the alphabet, the better. Searches of `failing` fail."""

    def __init__(self, failing: Sequence[str] = ()):
        self.failing = failing

    def values(self, fens: Sequence[str]) -> Iterator[list[MoveValue] | None]:
        for fen in fens:
            moves = sorted((move.uci() for move in chess.Board(fen).legal_moves), reverse=True)
            values = [MoveValue(move, 50 - 10 * rank, None) for rank, move in enumerate(moves)]
            yield None if fen in self.failing else values


def bare(fen: str, target: str = "") -> dict:
    return {"prompt": f"P: {fen}", "task": "policy", "target": target, "legal_moves": [], "legal_cp": []}


def test_every_move_is_valued_and_b_is_the_best_of_the_rows_own() -> None:
    report = ValuesReport()
    environment = {"prompt": "A: ...", "task": "environment", "target": "t", "legal_moves": [], "legal_cp": []}
    valued = bare(START) | {"legal_moves": ["e2e4"], "legal_cp": [1]}
    written = " M: d2d4 e2e4 E: 0.2 0.3 B: d2d4"
    rows = [bare(START, written), environment, bare(MATE_IN_ONE), dict(valued), bare(START)]
    first, second, third, fourth = with_values(rows, FixedPool([MATE_IN_ONE]), report)
    assert first["legal_cp"][first["legal_moves"].index("h2h4")] == 50  # the best, but not the row's
    assert first["target"] == " M: d2d4 e2e4 E: 0.2 0.3 B: e2e4"
    assert (second, third) == (environment, valued)
    assert fourth["target"].endswith("B: h2h4")
    assert (report.valued, report.failed, report.best_repaired) == (2, 1, 1)
    as_good = " M: d2d4 e2e4 E: 0.2 0.3 B: e2e4"
    (row,) = with_values([bare(START, as_good)], FixedPool(), ValuesReport())
    assert row["target"] == as_good


@requires_stockfish
def test_stockfish_values_a_users_prompts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cache = tmp_path / "prompts.jsonl", tmp_path / "cache" / "values.sqlite"
    fens = [START, MATE_IN_ONE]
    path.write_text("".join(json.dumps({"prompt": f"P: {fen}"}) + "\n" for fen in fens))
    options = DataOptions(best_move="engine", engine_nodes=500, engine_workers=2, engine_cache=str(cache))
    rows = load_prompts(str(path), options=options)
    for row, fen in zip(rows, fens, strict=True):
        assert row["legal_moves"] == sorted(move.uci() for move in chess.Board(fen).legal_moves)
    assert rows[1]["target"].endswith("B: a1a8")
    assert rows[1]["legal_cp"][rows[1]["legal_moves"].index("a1a8")] == 9999
    assert "2 P: rows valued" in capsys.readouterr().out
    size = cache.stat().st_size
    again = load_prompts(str(path), options=options)  # by the cache
    assert again["legal_cp"] == rows["legal_cp"]
    assert cache.stat().st_size == size


def test_an_engine_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKFISH_PATH", str(tmp_path / "gone"))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": f"P: {START}"}) + "\n")
    with pytest.raises(FileNotFoundError, match=r"gone.*install Stockfish"):
        load_prompts(str(path), options=DataOptions(best_move="engine", engine_cache=None))


@requires_stockfish
def test_a_run_that_is_killed_while_it_values_asks_only_for_the_rest(tmp_path: Path) -> None:
    """RookWorld's padded rows by a process that is killed, then by another: what the first has kept is asked once."""
    boards = [chess.Board()]
    while len(boards) < 40:  # different positions, in each of which the engine is busy for a while
        board = boards[-1].copy()
        board.push(sorted(board.legal_moves, key=lambda move: (len(boards) * 7 + move.to_square * 5) % 23)[0])
        boards.append(board)
    lines = []
    for board in boards:
        moves = [move.uci() for move in list(board.legal_moves)[:5]]
        evals = " ".join(["0.3"] * len(moves))
        lines.append({"text": f"P: {board.fen():90}M: {' '.join(moves):30}E: {evals:40}B: {moves[-1]}"})
    path, cache = tmp_path / "rows.jsonl", tmp_path / "values.sqlite"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = DataOptions(best_move="engine", engine_nodes=200_000, engine_workers=1, engine_cache=str(cache))
    code = f"from rookworld_trl.chess.sources import *; load_prompts({str(path)!r}, options={options!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    kept = 0
    while kept < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if cache.is_file():
            with closing(ValueCache(cache)) as answers:
                kept = len(answers)
    process.kill()
    process.wait()
    with closing(ValueCache(cache)) as answers:
        kept = len(answers)
    asked, analyse = [], Engine.analyse
    with patch.object(Engine, "analyse", lambda self, board, **how: asked.append(board) or analyse(self, board, **how)):
        rows = load_prompts(str(path), options=options)
    assert 3 <= kept < len(boards)
    assert len(asked) == len(boards) - kept
    assert len(rows) == len(boards)
    for row, line, board in zip(rows, lines, boards, strict=True):
        whole = row["prompt"] + row["target"]
        assert whole[:-6].rstrip("B: ") == line["text"][:-6].rstrip("B: ")  # padded as it came; B: may be another
        assert len(row["legal_cp"]) == board.legal_moves.count()
