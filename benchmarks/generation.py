"""How many positions a second does data generation write, and does it scale with cores? Needs Stockfish.

    python -m benchmarks.generation [--workers 1 2] [--shards 4]

`self_play`: positions of noisy self-play with the values of five moves (recipes/generate_data.py positions, its node
count); `every_move`: positions whose every legal move is valued, as the shipped set has them. Workers are engine
processes; each count does the same work in a fresh directory.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import chess
import pyarrow.parquet as pq

from benchmarks.common import RESULTS, machine, write_report
from recipes.making.generation import GameSettings, generate_positions, shard_path
from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.engine_pool import EnginePool

OUTPUT = RESULTS / "generation.json"
EVERY_MOVE_NODES = 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--games-per-shard", type=int, default=8)
    parser.add_argument("--positions", type=int, default=400, help="of which every move is valued")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    settings = GameSettings(games_per_shard=arguments.games_per_shard)
    results = []
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            shards = range(arguments.shards)
            written = sum(rows for _, rows in generate_positions(Path(folder), shards, settings, workers))
            seconds = time.perf_counter() - start
            fens = [
                fen for shard in shards for fen in pq.read_table(shard_path(Path(folder), shard))["fen"].to_pylist()
            ]
        with EnginePool(workers, nodes=EVERY_MOVE_NODES, hash_mb=4) as pool:
            chosen = fens[:: max(1, len(fens) // arguments.positions)][: arguments.positions]
            start = time.perf_counter()
            valued = sum(values is not None for values in pool.values(chosen))
            pool_seconds = time.perf_counter() - start
        result = {
            "workers": workers,
            "self_play": {"positions": written, "per_second": round(written / seconds, 1)},
            "every_move": {
                "positions": valued,
                "moves": sum(chess.Board(fen).legal_moves.count() for fen in chosen),
                "per_second": round(valued / pool_seconds, 1),
            },
        }
        print(json.dumps(result), flush=True)
        results.append(result)
    with Engine(nodes=1) as engine:
        name = engine.name
    report = {
        "engine": name,
        "nodes": {"self_play": settings.nodes, "every_move": EVERY_MOVE_NODES},
        **machine("cpu"),
        "results": results,
    }
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
