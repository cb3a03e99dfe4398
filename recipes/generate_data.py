"""Make chess data with an engine: positions by noisy self-play, and the shipped data set from such positions.

    python recipes/generate_data.py positions --output data/positions --shards 160 --openings openings.tsv
    python recipes/generate_data.py positions --output data/held-out --shards 60 --seed 1 --nodes 50 --held_out \\
        --openings openings.tsv
    python recipes/generate_data.py dataset --positions data/positions --held_out data/held-out \\
        --openings openings.tsv --output rookworld_trl/assets/data

Deterministic from --seed, game by game; run the same command again to resume. Needs Stockfish. On a cluster the same
shards are written by datatrove (extra `scale`), here by 64 tasks of a Slurm array job:

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
from recipes.making.shipping import Sources, build_shipped, candidates, counts
from rookworld_trl.chess.splits import SPLITS, SplitName
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    play = commands.add_parser(
        "positions", help="Make positions with the values of their best five moves, by self-play."
    )
    play.set_defaults(run=positions)
    play.add_argument("--output", type=Path, required=True, help="Folder for the shards.")
    play.add_argument("--shards", type=int, default=160)
    play.add_argument("--first_shard", type=int, default=0)
    play.add_argument("--games_per_shard", type=int, default=20)
    play.add_argument("--seed", type=int, default=0)
    play.add_argument("--nodes", type=int, default=1000, help="Engine nodes a position.")
    play.add_argument("--openings", help="TSV of opening lines (lichess-org/chess-openings); default: random openings.")
    play.add_argument(
        "--check_share", type=float, default=0.0, help="Share of the moves that could give check which do."
    )
    play.add_argument("--held_out", action="store_true", help="Games of which dev and test rows are made.")
    play.add_argument("--workers", type=int, default=os.cpu_count())
    executors = ("processes", "datatrove", "slurm")
    play.add_argument("--executor", choices=executors, default="processes", help="Who runs the workers.")
    play.add_argument("--tasks", type=int, help="Tasks of datatrove and Slurm; default: --workers.")
    play.add_argument("--partition", help="Slurm partition.")
    play.add_argument("--time", default="12:00:00", help="Time limit of a Slurm task.")
    play.add_argument("--engine", help="Path of the engine; default: Stockfish on PATH.")
    build = commands.add_parser("dataset", help="Make the data set for GRPO and evaluation, every legal move valued.")
    build.set_defaults(run=dataset)
    build.add_argument("--positions", type=Path, required=True, help="Folder that `positions` wrote.")
    build.add_argument("--held_out", type=Path, required=True, help="Folder that `positions --held_out` wrote.")
    build.add_argument("--openings", help="TSV of opening lines (lichess-org/chess-openings); default: no such rows.")
    build.add_argument("--output", type=Path, required=True)
    build.add_argument("--seed", type=int, default=0)
    build.add_argument(
        "--nodes", type=int, default=100_000, help="Engine nodes a dev or test position, shared by its legal moves."
    )
    build.add_argument("--train_nodes", type=int, default=20_000, help="Engine nodes a train position.")
    build.add_argument("--workers", type=int, default=os.cpu_count())
    build.add_argument("--engine", help="Path of the engine; default: Stockfish on PATH.")
    for command in (play, build):
        add_options(command)
    args = parser.parse_args(arguments)
    for name in ("shards", "games_per_shard", "nodes", "workers", "tasks"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            parser.error(f"--{name} must be 1 or more; got {value}")
    with bad_input(), shown(args) as result:
        result |= args.run(args)


if __name__ == "__main__":
    main()
