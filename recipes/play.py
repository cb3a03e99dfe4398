"""Matches between models, Stockfish and trivial players, from mirrored openings: results, Elo, games as PGN.

    python recipes/play.py nano random greedy --games 20
    python recipes/play.py runs/demo/checkpoint nano --pgn games.pgn
    python recipes/play.py nano stockfish --nodes 100 --output match.json

Every player meets every other. The first one's results are shown; the second one's rating is 0.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rookworld_trl.checkpointing.stopping import run_program
from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.ladder import ladder_table, run_match
from rookworld_trl.chess.play import (
    EnginePlayer,
    GreedyCapturePlayer,
    ModelPlayer,
    Player,
    RandomPlayer,
    random_openings,
)
from rookworld_trl.files import write_atomically
from rookworld_trl.modeling.loading import load
from rookworld_trl.reports.summary import command, versions
from rookworld_trl.settings.parser import bad_input
from rookworld_trl.settings.terminal import add_options, shown


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = "random, greedy, stockfish or a model: a folder, nano, or a name on the Hub."
    parser.add_argument("players", nargs="+", metavar="PLAYER", help=about)
    parser.add_argument("--games", type=int, default=20, help="Games of each pairing, an even number; default: 20.")
    parser.add_argument("--max_plies", type=int, default=200, help="A game that gets there is a draw; default: 200.")
    parser.add_argument("--nodes", type=int, default=1000, help="Nodes that Stockfish searches; default: 1000.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Models' temperature; default: greedy.")
    parser.add_argument("--max_new_tokens", type=int, default=80, help="Tokens of a model's answer, at most.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="Positions that a model decodes at a time.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pgn", type=Path, help="File that the games are written to, illegal moves replaced.")
    parser.add_argument("--output", type=Path, help="File that everything is written to, as JSON.")
    add_options(parser)
    args = parser.parse_args(arguments)
    if len(args.players) < 2:
        parser.error("give two or more players")
    if args.games < 2 or args.games % 2:
        parser.error(f"--games must be even and 2 or more, for each opening is played twice; got {args.games}")
    for name, least in (("max_plies", 1), ("batch_size", 1), ("nodes", 1), ("temperature", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more; got {getattr(args, name)}")
    return args


def player(name: str, args: argparse.Namespace, stack: ExitStack) -> Player:
    """The player of this name, its engine running or its model loaded."""
    if name == "random":
        return RandomPlayer(args.seed)
    if name == "greedy":
        return GreedyCapturePlayer(args.seed)
    if name == "stockfish":
        return EnginePlayer(stack.enter_context(Engine(nodes=args.nodes, hash_mb=1)))
    model, tokenizer = load(name)
    names = ("temperature", "max_new_tokens", "batch_size", "seed")
    settings = {each: getattr(args, each) for each in names}
    return ModelPlayer(model.to(args.device), tokenizer, name=name, **settings)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Play, and return what `--output` writes."""
    fens = random_openings(args.games // 2, args.seed)
    with ExitStack() as stack:
        players = [player(name, args, stack) for name in args.players]
        match = run_match(players, openings=fens, max_plies=args.max_plies, progress=True)
    print(ladder_table(match))
    if args.pgn:
        write_atomically(args.pgn, match.pgn())
    result = {"command": command(), "versions": versions(), **match.to_dict()}
    if args.output:
        write_atomically(args.output, json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with bad_input(), shown(args) as result:
        result |= run(args)


if __name__ == "__main__":
    run_program(main)
