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

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.making.generation import GameSettings, generate_positions
from recipes.making.shipping import Sources, build_shipped, candidates, counts
from rookworld_trl.chess.dataset import SPLITS, SplitName
from rookworld_trl.settings import parser
from rookworld_trl.settings.parser import RecipeError, bad_input, check_options, option
from rookworld_trl.settings.terminal import TerminalOptions, progress_bar, shown


@dataclass
class Output:
    """Where the files go, and how many processes make them."""

    output: Path = field(metadata={"help": "Folder for the files."})
    workers: int = option(os.cpu_count() or 1, "Processes.", least=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class Shards(Output):
    """Which files of positions are made."""

    shards: int = option(160, "How many files.", least=1)
    first_shard: int = option(0, "Number of the first one.", least=0)


@dataclass
class DataSet(Output):
    """How the data set for GRPO and evaluation is made."""

    seed: int = option(0, "Of what is drawn.")
    nodes: int = option(100_000, "Engine nodes a position of dev and test, of all its moves together.", least=1)
    train_nodes: int = option(20_000, "Engine nodes of a train position.", least=1)


def positions(where: Shards, settings: GameSettings) -> dict[str, Any]:
    """Make positions with the values of their best five moves, by self-play: write the missing shards."""
    shards = range(where.first_shard, where.first_shard + where.shards)
    total = 0
    with progress_bar("positions", where.shards, "shard") as bar:
        for _, rows in generate_positions(where.output, shards, settings, where.workers):
            total += rows
            bar.update()
            bar.set_postfix(positions=total)
    return {"output": str(where.output), "positions": total}


def dataset(where: DataSet, sources: Sources) -> dict[str, Any]:
    """Make the data set, every legal move valued: write the three splits; the rows of each stratum are told."""
    nodes: dict[SplitName, int] = {"train": where.train_nodes, "dev": where.nodes, "test": where.nodes}
    with progress_bar("values", sum(sum(candidates(split).values()) for split in SPLITS), "position") as bar:
        for valued in build_shipped(sources, where.output, where.seed, nodes, where.workers):
            bar.update(valued)
    rows = {split: dict(sorted(strata.items())) for split, strata in counts(where.output).items()}
    for split, strata in rows.items():
        print(split, strata)
    return {"output": str(where.output), "rows": rows}


COMMANDS: dict[str, tuple[Any, tuple[type, ...]]] = {
    "positions": (positions, (Shards, GameSettings)),
    "dataset": (dataset, (DataSet, Sources)),
}


def parse(arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The command's function, its two dataclasses, and what the terminal shows."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in COMMANDS:
        raise RecipeError(f"command line: '{name}' is no command; write `positions` or `dataset`, and --help behind it")
    command, classes = COMMANDS[name]
    return command, *parser.parse((*classes, TerminalOptions), words, __doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    with bad_input():
        command, where, of_what, options = parse(arguments)
        with shown(options) as result:
            result |= command(where, of_what)


if __name__ == "__main__":
    main()
