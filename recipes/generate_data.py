"""Make chess data with an engine: positions by noisy self-play, the data set from such positions, problems to solve.

    python recipes/generate_data.py positions --output data/positions --shards 160 --openings openings.tsv
    python recipes/generate_data.py positions --output data/held-out --shards 60 --seed 1 --nodes 50 --held_out \\
        --openings openings.tsv
    python recipes/generate_data.py dataset --positions data/positions --held_out data/held-out \\
        --openings openings.tsv --output rookworld_trl/assets/data
    python recipes/generate_data.py mates --output rookworld_trl/assets/data
    python recipes/generate_data.py tactics --openings openings.tsv --output rookworld_trl/assets/data

`dataset` values every legal move; `mates` and `tactics` are the problems that evaluation takes, whose rules stand in
`recipes/making/problems.py`. Deterministic from --seed, game by game; run the same command again to resume. All but
`mates` needs Stockfish. On a cluster the shards of `positions` are written by datatrove (extra `scale`), here by 64
tasks of a Slurm array job:

    python recipes/generate_data.py positions --output /shared/positions --shards 100000 \\
        --executor slurm --tasks 64 --partition cpu --time 12:00:00
"""

if __name__ == "__main__":  # run as a file, it does not find `recipes` by itself
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipes.making.generation import GameSettings, generate_positions, missing_shards, write_shards_of_rank
from recipes.making.problems import (
    LABEL_NODES,
    MATES,
    MATES_SEED,
    TACTICS,
    TACTICS_SEED,
    build_mates,
    build_tactics,
    shipped_keys,
)
from recipes.making.shipping import Sources, build_shipped, candidates, counts
from rookworld_trl.chess.dataset import SPLITS, TACTICS_FILES, SplitName
from rookworld_trl.settings.parser import bad_input
from rookworld_trl.settings.terminal import add_options, progress_bar, shown


def positions(args: argparse.Namespace) -> dict[str, Any]:
    """Write the missing shards; return how many positions they hold, where this process has made them."""
    settings = GameSettings(
        seed=args.seed,
        nodes=args.nodes,
        games_per_shard=args.games_per_shard,
        openings=args.openings,
        check_share=args.check_share,
        held_out=args.held_out,
    )
    shards = range(args.first_shard, args.first_shard + args.shards)
    if args.executor != "processes":
        positions_by_datatrove(args, shards, settings)
        return {"output": str(args.output)}
    total = 0
    with progress_bar("positions", args.shards, "shard") as bar:
        for _, rows in generate_positions(args.output, shards, settings, args.workers, args.engine):
            total += rows
            bar.update()
            bar.set_postfix(positions=total)
    return {"output": str(args.output), "positions": total}


def positions_by_datatrove(args: argparse.Namespace, shards: range, settings: GameSettings) -> None:
    """The missing shards as a datatrove pipeline: on this machine, or as a Slurm array job."""
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError as error:
        raise ValueError(f"--executor {args.executor} needs datatrove: pip install 'rookworld-trl[scale]'") from error
    output = args.output.resolve()
    missing = missing_shards(output, shards, settings)
    if not missing:
        return
    step = partial(write_shards_of_rank, shards=missing, directory=output, settings=settings, engine_path=args.engine)
    tasks = min(args.tasks or args.workers, len(missing))
    # What is done is told by the shards, not by datatrove's marks.
    common = {"pipeline": [step], "tasks": tasks, "logging_dir": str(output / "logs"), "skip_completed": False}
    if args.executor == "datatrove":
        LocalPipelineExecutor(**common, workers=args.workers).run()
    else:
        if not args.partition:
            raise ValueError("--partition: give the Slurm partition that --executor slurm submits to")
        slurm = {"time": args.time, "partition": args.partition, "job_name": "positions", "venv_path": sys.prefix}
        SlurmPipelineExecutor(**common, **slurm).run()


def dataset(args: argparse.Namespace) -> dict[str, Any]:
    """Write the three splits; return how many rows of each stratum they hold."""
    nodes: dict[SplitName, int] = {"train": args.train_nodes, "dev": args.nodes, "test": args.nodes}
    sources = Sources(args.positions, args.held_out, args.openings)
    with progress_bar("values", sum(sum(candidates(split).values()) for split in SPLITS), "position") as bar:
        for valued in build_shipped(sources, args.output, args.seed, nodes, args.workers, args.engine):
            bar.update(valued)
    rows = {split: dict(sorted(strata.items())) for split, strata in counts(args.output).items()}
    for split, strata in rows.items():
        print(split, strata)
    return {"output": str(args.output), "rows": rows}


def write_mates(args: argparse.Namespace) -> dict[str, Any]:
    """Write positions with a mate in one."""
    build_mates(args.output, args.count, args.seed)
    return {"output": str(args.output)}


def write_tactics(args: argparse.Namespace) -> dict[str, Any]:
    """Write positions in which one move wins, for dev and test, none of which another shipped file shows."""
    settings = {"count": args.count, "seed": args.seed, "nodes": args.nodes, "workers": args.workers}
    settings |= {"openings": args.openings, "engine_path": args.engine}
    with progress_bar("tactics", len(TACTICS_FILES) * args.count, "position") as bar:
        for found in build_tactics(args.output, shipped_keys(), **settings):
            bar.update(found - bar.n)
    return {"output": str(args.output)}


# What each command takes, as argparse has it; what several take stands once.
COMMON: dict[str, dict[str, Any]] = {
    "output": {"type": Path, "required": True, "help": "Folder for the files."},
    "seed": {"type": int, "default": 0},
    "openings": {"help": "TSV of opening lines (lichess-org/chess-openings); default: random ones, or no such rows."},
    "workers": {"type": int, "default": os.cpu_count()},
    "engine": {"help": "Path of the engine; default: Stockfish on PATH."},
}
NODES = {"type": int, "help": "Engine nodes a position; of all its legal moves together."}
POSITIONS: dict[str, dict[str, Any]] = {
    "shards": {"type": int, "default": 160},
    "first_shard": {"type": int, "default": 0},
    "games_per_shard": {"type": int, "default": 20},
    "nodes": NODES | {"default": 1000},
    "check_share": {"type": float, "default": 0.0, "help": "Share of the moves that could give check which do."},
    "held_out": {"action": "store_true", "help": "Games of which dev and test rows are made."},
    "executor": {"choices": ("processes", "datatrove", "slurm"), "default": "processes"},
    "tasks": {"type": int, "help": "Tasks of datatrove and Slurm; default: --workers."},
    "partition": {"help": "Slurm partition."},
    "time": {"default": "12:00:00", "help": "Time limit of a Slurm task."},
}
DATASET: dict[str, dict[str, Any]] = {
    "positions": {"type": Path, "required": True, "help": "Folder that `positions` wrote."},
    "held_out": {"type": Path, "required": True, "help": "Folder that `positions --held_out` wrote."},
    "nodes": NODES | {"default": 100_000},
    "train_nodes": {"type": int, "default": 20_000, "help": "Engine nodes of a train position."},
}
COUNT = {"type": int, "help": "Positions of each file."}
SEED = COMMON["seed"]
MATING = {"output": COMMON["output"], "count": COUNT | {"default": MATES}, "seed": SEED | {"default": MATES_SEED}}
WINNING = {"count": COUNT | {"default": TACTICS}, "seed": SEED | {"default": TACTICS_SEED}}
WINNING |= {"nodes": NODES | {"default": LABEL_NODES}}
COMMANDS: dict[str, tuple[Any, str, dict[str, dict[str, Any]]]] = {
    "positions": (
        positions,
        "Make positions with the values of their best five moves, by self-play.",
        COMMON | POSITIONS,
    ),
    "dataset": (dataset, "Make the data set for GRPO and evaluation, every legal move valued.", COMMON | DATASET),
    "mates": (write_mates, "Find positions with a mate in one.", MATING),
    "tactics": (write_tactics, "Find positions in which one move wins, for dev and test.", COMMON | WINNING),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, (program, about, options) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        command.set_defaults(run=program)
        for key, option in options.items():
            command.add_argument(f"--{key}", **option)
        add_options(command)
    args = parser.parse_args(arguments)
    for name in ("shards", "games_per_shard", "nodes", "train_nodes", "workers", "tasks", "count"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            parser.error(f"--{name} must be 1 or more; got {value}")
    with bad_input(), shown(args) as result:
        result |= args.run(args)


if __name__ == "__main__":
    main()
