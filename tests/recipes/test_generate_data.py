"""The data recipe from its command line: workers of its own, and tasks of datatrove."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipes.making.generation import GameSettings, generate_positions, shard_path
from tests.support.stockfish import requires_stockfish

RECIPE = Path(__file__).parents[2] / "recipes" / "generate_data.py"
SETTINGS = GameSettings(seed=5, nodes=100, games_per_shard=1)


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE), "positions", "--seed", "5", "--nodes", "100", "--games_per_shard", "1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@requires_stockfish
def test_two_tasks_of_datatrove_write_what_one_process_writes(tmp_path: Path) -> None:
    dict(generate_positions(tmp_path / "one", range(3), SETTINGS, workers=1))
    several = ["--output", str(tmp_path / "two"), "--shards", "3", "--executor", "datatrove", "--tasks", "2"]
    done = recipe(*several, "--workers", "2")
    assert done.returncode == 0, done.stderr
    for shard in range(3):
        written = pq.read_table(shard_path(tmp_path / "two", shard))
        assert written.equals(pq.read_table(shard_path(tmp_path / "one", shard)))
    # A lost shard is written again, whatever the run before thought it had finished.
    shard_path(tmp_path / "two", 1).unlink()
    assert recipe(*several, "--workers", "1").returncode == 0
    assert shard_path(tmp_path / "two", 1).exists()
