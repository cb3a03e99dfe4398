"""The shipped data set for GRPO and evaluation: compact on disk, whole rows in memory."""

import gzip
import random
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.splits import SPLITS, SplitName
from rookworld_trl.settings.terminal import with_bar

SHIPPED_DIRECTORY = Path(str(files("rookworld_trl"))) / "assets" / "data"
# Positions to be solved, which recipes/generate_data.py found; no training source shows them.
MATES_FILE = SHIPPED_DIRECTORY / "mate_in_one.epd.gz"
TACTICS_FILES: dict[SplitName, Path] = {
    "dev": SHIPPED_DIRECTORY / "tactics_dev.epd.gz",
    "test": SHIPPED_DIRECTORY / "tactics_test.epd.gz",
}
PROBLEM_FILES = (MATES_FILE, *TACTICS_FILES.values())

# What is on disk. Prompts, answers and legal moves follow from it by python-chess.
COMPACT_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("fen", pa.string()),
        ("move", pa.string()),  # A: only
        ("history", pa.string()),  # A: only; the moves before, oldest first
        ("cp", pa.list_(pa.int16())),  # P: only; of each legal move, in UCI order; mates +-(10000 - moves to mate)
        ("stratum", pa.string()),
        ("game", pa.string()),  # what the position was taken from; empty: from nothing that gave another row
    ]
)


def expand(record: Mapping[str, Any]) -> dict[str, Any]:
    """A compact record as a row with `prompt`, `task`, `target`, `legal_moves`, `legal_cp`, `stratum` and `game`.

    Raises:
        ValueError: a `P:` record does not hold one value for each legal move.
    """
    row = {"task": record["task"], "stratum": record["stratum"], "game": record.get("game") or ""}
    row |= {"legal_moves": [], "legal_cp": []}
    if record["task"] == "environment":
        output = environment.transition(record["fen"], record["move"])
        prompt = environment.prompt(record["fen"], record["move"], record["history"].split())
        return row | {"prompt": prompt, "target": environment.format_completion(output)}
    moves = sorted(move.uci() for move in chess.Board(record["fen"]).legal_moves)
    values = record["cp"]
    if len(values) != len(moves):
        raise ValueError(f"field 'cp' of {record['fen']}: {len(values)} values for {len(moves)} legal moves")
    answer = {
        "prompt": policy.prompt(record["fen"]),
        "target": policy.policy_completion(moves, values, random.Random(record["fen"])),
    }
    return row | answer | {"legal_moves": moves, "legal_cp": values}


def load_shipped(split: str, directory: Path = SHIPPED_DIRECTORY) -> Dataset:
    """The shipped rows of `train`, `dev` or `test`, both tasks, in the shipped (shuffled) order.

    Columns: `prompt`, `task` (`policy` or `environment`), `target` (gold completion), `legal_moves` and `legal_cp`
    (`P:` rows: every legal move in UCI order and its engine value in centipawns from the mover's side; `A:` rows:
    empty), `stratum`, `game` (what the position was taken from, or empty: intervals go by game).

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split '{split}' does not exist; choose one of {', '.join(SPLITS)}")
    records = pq.read_table(directory / f"{split}.parquet").to_pylist()
    return Dataset.from_list([expand(each) for each in with_bar(records, f"read {split}", len(records), "row")])


def positions_of_record(record: Mapping[str, Any]) -> list[str]:
    """The positions of a compact record, by `position_key`: its own and, for `A:`, the one that its move leads to."""
    fens = [record["fen"]]
    if record["task"] == "environment":
        fens.append(environment.transition(record["fen"], record["move"]).fen)
    return [position_key(fen) for fen in fens]


def shipped_positions(split: str, directory: Path = SHIPPED_DIRECTORY) -> set[str]:
    """All positions that a shipped split shows, in prompts and in answers, by `position_key`."""
    records = pq.read_table(directory / f"{split}.parquet", columns=["task", "fen", "move"]).to_pylist()
    return {position for record in records for position in positions_of_record(record)}


def positions_to_solve(file: Path) -> set[str]:
    """The positions of one of `PROBLEM_FILES`, by `position_key`."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return {position_key(chess.Board.from_epd(line)[0].fen()) for line in lines}


def held_out_positions() -> set[str]:
    """All positions, by `position_key`, that the shipped data measures on: dev and test, in prompts and in answers,
    mates in one and tactics."""
    splits = map(shipped_positions, ("dev", "test"))
    return set().union(*splits, *map(positions_to_solve, PROBLEM_FILES))
