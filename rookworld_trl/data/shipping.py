"""Builds the shipped data set from generated positions: stratified, deduplicated, every legal move valued."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq

from rookworld_trl.data.dataset import COMPACT_SCHEMA
from rookworld_trl.data.generation import write_parquet
from rookworld_trl.data.splits import SPLITS, SplitName, split_of
from rookworld_trl.data.strata import illegal_move, phase, stratum
from rookworld_trl.engine import Engine
from rookworld_trl.tasks import environment, position_key

POLICY_ROWS: dict[SplitName, int] = {"train": 12_000, "dev": 2_000, "test": 3_000}
ENVIRONMENT_ROWS: dict[SplitName, int] = {"train": 9_000, "dev": 1_000, "test": 1_500}

# Shares of the strata; a stratum that has too few rows gives its place to quiet moves.
POLICY_SHARES = {"opening": 0.2, "middlegame": 0.45, "endgame": 0.35}
ENVIRONMENT_SHARES = {
    "illegal": 0.12,
    "mate": 0.05,
    "stalemate": 0.02,
    "draw": 0.02,
    "promotion": 0.06,
    "en_passant": 0.04,
    "castle_king": 0.05,
    "castle_queen": 0.04,
    "check": 0.1,
    "capture": 0.2,
    "quiet": 0.3,
}


def read_pool(shards: Iterable[Path], seed: int, limit: dict[SplitName, int]) -> dict[SplitName, list[dict[str, Any]]]:
    """Distinct positions of each split in random order; whatever the order of the shards, the same for a seed."""
    pool: dict[SplitName, dict[str, dict[str, Any]]] = {split: {} for split in SPLITS}
    for shard in sorted(shards):
        for record in pq.read_table(shard, columns=["fen", "history"]).to_pylist():
            pool[split_of(record["fen"])].setdefault(position_key(record["fen"]), record)
    shuffled = {}
    for split, records in pool.items():
        order = list(records.values())
        random.Random(f"{seed}:{split}").shuffle(order)
        shuffled[split] = order[: limit[split]]
    return shuffled


def choose_policy_positions(records: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The first positions of each phase that fill its share, White and Black to move alike."""
    wanted = {(name, turn): round(rows * share / 2) for name, share in POLICY_SHARES.items() for turn in (True, False)}
    chosen = []
    for record in records:
        board = chess.Board(record["fen"])
        kind = phase(board)
        if wanted[kind, board.turn]:
            wanted[kind, board.turn] -= 1
            chosen.append({"task": "policy", "fen": record["fen"], "move": "", "history": "", "stratum": kind})
    return chosen


def choose_environment_rows(
    records: list[dict[str, Any]], rows: int, split: SplitName, rng: random.Random, taken: set[str]
) -> list[dict[str, Any]]:
    """One `A:` row a position at most, each stratum filled to its share; `taken` are positions of other splits.

    No row of one split leads to a position that stands in another.
    """
    offers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        board = chess.Board(record["fen"])
        moves = [move.uci() for move in board.legal_moves]
        if not moves:
            continue
        kinds: dict[str, str] = {}  # rarest first: one random move a kind
        for uci in rng.sample(moves, len(moves)):
            kinds.setdefault(stratum(board, uci), uci)
        kinds["illegal"] = illegal_move(board, rng)
        for kind, uci in kinds.items():
            after = environment.transition(record["fen"], uci).fen
            if position_key(after) in taken or (split == "train" and split_of(after) != "train"):
                continue
            offers[kind].append(
                {
                    "task": "environment",
                    "move": uci,
                    "fen": record["fen"],
                    "history": record["history"],
                    "stratum": kind,
                }
            )
    chosen: dict[str, dict[str, Any]] = {}
    for kind, share in ENVIRONMENT_SHARES.items():  # quiet comes last and fills up
        quota = rows - len(chosen) if kind == "quiet" else round(rows * share)
        fresh = (row for row in offers[kind] if row["fen"] not in chosen)
        for _, row in zip(range(quota), fresh, strict=False):
            chosen[row["fen"]] = row
    return list(chosen.values())


def value_every_move(fens: list[str], nodes: int, engine_path: str | None) -> list[list[int] | None]:
    """Engine values of all legal moves of each position, in UCI order; None where the engine failed."""
    values: list[list[int] | None] = []
    with Engine(engine_path, nodes=nodes, cache_size=0, hash_mb=4) as engine:
        for fen in fens:
            found = engine.analyse(chess.Board(fen), multipv=500, game=fen)
            values.append([value.centipawns for value in sorted(found, key=lambda v: v.move)] if found else None)
    return values


def build_shipped(
    positions: Path, output: Path, seed: int, nodes: int, workers: int, engine_path: str | None = None
) -> Iterator[int]:
    """Write `train`, `dev` and `test` Parquet files; yields the number of positions valued since the last yield."""
    pool = read_pool(positions.glob("positions-*.parquet"), seed, {"train": 60_000, "dev": 20_000, "test": 20_000})
    taken: set[str] = set()
    tables: dict[SplitName, list[dict[str, Any]]] = {}
    for split in ("test", "dev", "train"):
        rng = random.Random(f"{seed}:{split}:rows")
        half = len(pool[split]) // 2  # a position is a P: row or an A: row, not both
        policy_rows = choose_policy_positions(pool[split][:half], POLICY_ROWS[split])
        environment_rows = choose_environment_rows(pool[split][half:], ENVIRONMENT_ROWS[split], split, rng, taken)
        # A later split leaves out what an earlier one shows, as a prompt or as an answer.
        tables[split] = [row for row in policy_rows + environment_rows if position_key(row["fen"]) not in taken]
        for row in tables[split]:
            taken.add(position_key(row["fen"]))
            if row["task"] == "environment":
                taken.add(position_key(environment.transition(row["fen"], row["move"]).fen))
    output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(max_workers=workers) as executor:
        for split, rows in tables.items():
            todo = [row for row in rows if row["task"] == "policy"]
            chunks = [todo[i : i + 50] for i in range(0, len(todo), 50)]
            jobs = [executor.submit(value_every_move, [row["fen"] for row in c], nodes, engine_path) for c in chunks]
            for chunk, job in zip(chunks, jobs, strict=True):
                for row, values in zip(chunk, job.result(), strict=True):
                    row["cp"] = values
                yield len(chunk)
            done = [row | {"cp": row.get("cp", [])} for row in rows if row.get("cp", []) is not None]
            random.Random(f"{seed}:{split}:order").shuffle(done)
            write_parquet(pa.Table.from_pylist(done, schema=COMPACT_SCHEMA), output / f"{split}.parquet")


def counts(directory: Path) -> dict[str, Counter[str]]:
    """Rows per split and stratum of a built data set, for its card."""
    return {
        split: Counter(
            f"{row['task']}/{row['stratum']}" for row in pq.read_table(directory / f"{split}.parquet").to_pylist()
        )
        for split in SPLITS
    }
