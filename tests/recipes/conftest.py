"""A handful of checked rows of both tasks, standing in for the shipped splits, and runs of grpo.py over them."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import chess
import pytest
from datasets import Dataset

from recipes import grpo
from rookworld_trl.chess import prompts
from rookworld_trl.chess.dataset import positions_in
from rookworld_trl.chess.sources import load_prompts
from rookworld_trl.training import RookWorldGRPOTrainer

OPENINGS = ["e2e4", "d2d4", "g1f3", "c2c4", "b1c3", "f2f4", "b2b3", "g2g3", "e2e3", "d2d3", "c2c3", "a2a3"]


def row(board: chess.Board, task: str) -> dict:
    moves = sorted(move.uci() for move in board.legal_moves)
    if task == "environment":
        return {"prompt": f"A: {board.fen()}+{moves[0]}+{moves[0]}+", "legal_moves": [], "legal_cp": []}
    return {"prompt": f"P: {board.fen()}", "legal_moves": moves, "legal_cp": list(range(len(moves)))}


def positions(first: int, count: int) -> list[chess.Board]:
    """Positions after one white move and the first black reply, `first` on; all different."""
    boards = []
    for opening in OPENINGS[first : first + count]:
        board = chess.Board()
        board.push_uci(opening)
        boards.append(board)
    return boards


def written(path: Path, boards: list[chess.Board]) -> Path:
    rows = [row(board, task) for board in boards for task in ("policy", "environment")]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Eight positions, each as a `P:` row and as an `A:` row."""
    return written(tmp_path / "rows.jsonl", positions(0, 8))


@pytest.fixture
def held_out(tmp_path: Path) -> Dataset:
    """Four other positions, likewise."""
    return load_prompts(str(written(tmp_path / "held-out.jsonl", positions(8, 4))))


@pytest.fixture
def arguments(tiny_checkpoint, rows_file, held_out, tmp_path, monkeypatch):
    """A run of grpo.py: two steps, five prompts a batch, one of them `A:`; settings that a test may change."""
    monkeypatch.setattr(prompts, "load_shipped", lambda split: held_out)
    monkeypatch.setattr(prompts, "held_out_positions", lambda: positions_in(held_out))
    return {
        "model": tiny_checkpoint,
        "dataset": rows_file,
        "output_dir": tmp_path / "run",
        "mix_env_ratio": 0.2,
        "max_steps": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 10,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def run(arguments: dict, code: int = 0) -> None:
    """grpo.py with these settings; it must end with this exit code."""
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    ending = pytest.raises(SystemExit) if code else nullcontext()
    with patch.object(sys, "argv", ["recipes/grpo.py", *words]), ending as ended:  # what the card quotes
        grpo.main()
    assert not code or ended.value.code == code


def summary_of(arguments: dict) -> dict:
    return json.loads((arguments["output_dir"] / "summary.json").read_text())


@pytest.fixture
def trainers(monkeypatch) -> list[RookWorldGRPOTrainer]:
    """Those that runs of grpo.py build."""
    made, build = [], grpo.build

    def kept(*args):
        both = build(*args)
        made.append(both[0])
        return both

    monkeypatch.setattr(grpo, "build", kept)
    return made


@pytest.fixture
def rewarded(monkeypatch):
    """How many completions each call of the reward got, and its columns. It is their length: the random model's chess
    earns -0.3 whatever it writes, and nothing would be learned. A test may add what happens at a call.
    """
    calls: list[int] = []
    seen: list[dict] = []
    happens: dict[int, Callable[[], None]] = {}

    def by_length(prompts, completions, **columns):
        calls.append(len(prompts))
        seen.append(columns | {"prompts": prompts})
        happens.get(len(calls), lambda: None)()
        return [float(len(completion)) for completion in completions]

    for name in grpo.REWARDS:
        monkeypatch.setitem(grpo.REWARDS, name, [by_length])
    return SimpleNamespace(calls=calls, seen=seen, happens=happens)
