"""Make chess data with an engine: positions by noisy self-play, and the data set from such positions.

    python recipes/generate_data.py positions --output data/positions --shards 160 --openings openings.tsv
    python recipes/generate_data.py positions --output data/held-out --shards 60 --seed 1 --nodes 50 --held_out \\
        --openings openings.tsv
    python recipes/generate_data.py dataset --positions data/positions --held_out data/held-out \\
        --openings openings.tsv --output rookworld_trl/assets/data

`dataset` values every legal move. Needs Stockfish ($STOCKFISH_PATH, or on PATH). Deterministic from --seed, game by
game; run the same command again to resume. Several machines share the shards by --first_shard and --shards.
"""

if __name__ == "__main__":  # run as a file, it does not find `recipes` by itself
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.making.generation import GameSettings, generate_positions
from recipes.making.shipping import Sources, build_shipped, candidates, counts
from rookworld_trl.chess.dataset import SPLITS, SplitName
from rookworld_trl.settings.parser import bad_input
from rookworld_trl.settings.terminal import add_options, progress_bar, shown


def positions(args: argparse.Namespace) -> dict[str, Any]:
    """Write the missing shards; return how many positions they hold."""
    settings = GameSettings(
        seed=args.seed,
        nodes=args.nodes,
        games_per_shard=args.games_per_shard,
        openings=args.openings,
        check_share=args.check_share,
        held_out=args.held_out,
    )
    shards = range(args.first_shard, args.first_shard + args.shards)
    total = 0
    with progress_bar("positions", args.shards, "shard") as bar:
        for _, rows in generate_positions(args.output, shards, settings, args.workers):
            total += rows
            bar.update()
            bar.set_postfix(positions=total)
    return {"output": str(args.output), "positions": total}


def dataset(args: argparse.Namespace) -> dict[str, Any]:
    """Write the three splits; return how many rows of each stratum they hold."""
    nodes: dict[SplitName, int] = {"train": args.train_nodes, "dev": args.nodes, "test": args.nodes}
    sources = Sources(args.positions, args.held_out, args.openings)
    with progress_bar("values", sum(sum(candidates(split).values()) for split in SPLITS), "position") as bar:
        for valued in build_shipped(sources, args.output, args.seed, nodes, args.workers):
            bar.update(valued)
    rows = {split: dict(sorted(strata.items())) for split, strata in counts(args.output).items()}
    for split, strata in rows.items():
        print(split, strata)
    return {"output": str(args.output), "rows": rows}


# What each command takes, as argparse has it; what several take stands once.
COMMON: dict[str, dict[str, Any]] = {
    "output": {"type": Path, "required": True, "help": "Folder for the files."},
    "seed": {"type": int, "default": 0},
    "openings": {"help": "TSV of opening lines (lichess-org/chess-openings); default: random ones, or no such rows."},
    "workers": {"type": int, "default": os.cpu_count()},
}
NODES = {"type": int, "help": "Engine nodes a position; of all its legal moves together."}
POSITIONS: dict[str, dict[str, Any]] = {
    "shards": {"type": int, "default": 160},
    "first_shard": {"type": int, "default": 0},
    "games_per_shard": {"type": int, "default": 20},
    "nodes": NODES | {"default": 1000},
    "check_share": {"type": float, "default": 0.0, "help": "Share of the moves that could give check which do."},
    "held_out": {"action": "store_true", "help": "Games of which dev and test rows are made."},
}
DATASET: dict[str, dict[str, Any]] = {
    "positions": {"type": Path, "required": True, "help": "Folder that `positions` wrote."},
    "held_out": {"type": Path, "required": True, "help": "Folder that `positions --held_out` wrote."},
    "nodes": NODES | {"default": 100_000},
    "train_nodes": {"type": int, "default": 20_000, "help": "Engine nodes of a train position."},
}
COMMANDS: dict[Any, tuple[str, dict[str, dict[str, Any]]]] = {
    positions: ("Make positions with the values of their best five moves, by self-play.", COMMON | POSITIONS),
    dataset: ("Make the data set for GRPO and evaluation, every legal move valued.", COMMON | DATASET),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for program, (about, options) in COMMANDS.items():
        command = commands.add_parser(program.__name__, help=about)
        command.set_defaults(run=program)
        for key, option in options.items():
            command.add_argument(f"--{key}", **option)
        add_options(command)
    args = parser.parse_args(arguments)
    for name in ("shards", "games_per_shard", "nodes", "train_nodes", "workers"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            parser.error(f"--{name} must be 1 or more; got {value}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with bad_input(), shown(args) as result:
        result |= args.run(args)


if __name__ == "__main__":
    main()
