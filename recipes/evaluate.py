"""Measure a model on held-out positions, greedy and sampled; optionally against an earlier evaluation, item by item.

    python recipes/evaluate.py
    python recipes/evaluate.py --model runs/demo/checkpoint --output after.json --baseline before.json
    python recipes/evaluate.py --dataset games.pgn --best_move engine --limit 500
    python recipes/evaluate.py --suite mate_in_one --dataset task.json     (BIG-bench; or Lichess's puzzles as .csv)
    python recipes/evaluate.py --suite sts --dataset STS1-STS15_LAN_v8.epd
    python recipes/evaluate.py --suite selfplay --limit 100
    python recipes/evaluate.py --suite ladder --pgn games.pgn        (Elo against Stockfish; all its games)
    python recipes/evaluate.py --suite llm_chess --move_by evals

Prints a table with 95 % intervals, over games where the rows come from games, else over rows; --output keeps every
item's or game's result as JSON.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from transformers import PreTrainedModel

from rookworld_trl.checkpointing.exits import run_program
from rookworld_trl.config import bad_input, blame
from rookworld_trl.data import load_shipped
from rookworld_trl.data.sources import DataOptions, load_prompts
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.engine import find_engine
from rookworld_trl.evaluation import (
    MODES,
    Evaluation,
    compare,
    compare_groups,
    comparison_table,
    evaluate,
    evaluation_table,
    ladder_table,
    read_puzzles,
    read_sts,
    run_ladder,
    run_llm_chess,
    run_mate_in_one,
    run_selfplay,
    run_sts,
    standard_anchors,
    suite_table,
)
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.play import ModelPlayer
from rookworld_trl.reports.summary import command, versions
from rookworld_trl.tasks import PREFIXES

# Reader of the suite's file, and the suite.
FILE_SUITES: dict[str, Any] = {"mate_in_one": (read_puzzles, run_mate_in_one), "sts": (read_sts, run_sts)}
GAME_SUITES = ("ladder", "llm_chess")
OPENINGS = 50
READING = [option for option in fields(DataOptions) if option.name != "leading_eos"]


def data_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the rows, which says whether two evaluations saw the same data."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation written with --output.

    Raises:
        ValueError: the file is no such evaluation.
    """
    try:
        return Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=NANO, help="A folder, or a name on the Hub; default: rookworld-nano.")
    parser.add_argument("--leading_eos", action="store_true", help="Put the end token in front of every prompt.")
    parser.add_argument(
        "--suite",
        choices=("held_out", *FILE_SUITES, "selfplay", *GAME_SUITES),
        default="held_out",
        help="What to measure on. ladder: games against players from a random mover to Stockfish, rated together. "
        "llm_chess: that benchmark's game, Black against a random White.",
    )
    parser.add_argument("--split", default="test", help="Split of the shipped data: dev or test.")
    parser.add_argument("--dataset", help="A file, or a name on the Hub and its --split, instead of the shipped data.")
    parser.add_argument(
        "--limit",
        type=int,
        help="Measure only so many rows of each task, positions of a suite, games of selfplay or llm_chess (100), or "
        f"openings of the ladder ({OPENINGS}). Rows are drawn at random, the same in every run, from as many games as "
        "possible.",
    )
    parser.add_argument(
        "--mode", choices=(*MODES, "both"), default="both", help="Decoding; default: both, but greedy in played games."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Temperature of the sampled mode.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="Prompts decoded at a time.")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=144,
        help="Tokens of a completion, at most; fewer where the model's context ends.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--baseline", type=Path, help="JSON of an earlier evaluation to compare with, item by item.")
    parser.add_argument("--output", type=Path, help="File that everything is written to, as JSON.")
    playing = parser.add_argument_group("How the model plays, in the suites ladder and llm_chess")
    playing.add_argument(
        "--move_by", choices=("best", "evals"), help="Its move: B: or its highest eval; default: best."
    )
    playing.add_argument(
        "--retries",
        type=int,
        help="Sample an illegal move again so often; default: 0, in llm_chess 2, as its rules say.",
    )
    playing.add_argument("--pgn", type=Path, help="File that the games are written to, illegal moves replaced.")
    reading = parser.add_argument_group("How --dataset is read, as in recipes/grpo.py")
    for option in READING:
        kind = get_type_hints(DataOptions)[option.name]
        how: dict[str, Any] = {"type": int if kind in (int, int | None) else str}
        if get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        elif kind is bool:
            how = {"action": "store_true"}
        about = f"{option.metadata['help']} [{option.default}]".replace("%", "%%")
        reading.add_argument(f"--{option.name}", default=option.default, help=about, **how)
    args = parser.parse_args(arguments)
    changed = [option.name for option in READING if getattr(args, option.name) != option.default]
    if changed and (not args.dataset or args.suite != "held_out"):
        parser.error(f"--{changed[0]} says how the rows of --dataset are read, and there are none; leave it out")
    for name in ("limit", "batch_size", "max_new_tokens", "temperature"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} must be above 0; got {value}")
    if args.baseline and args.suite != "held_out":
        parser.error(f"--baseline compares evaluations of the suite held_out; leave it out with --suite {args.suite}")
    if args.dataset and args.suite in ("selfplay", *GAME_SUITES):
        parser.error(f"--suite {args.suite} takes no --dataset: the model plays games")
    played = [name for name in ("move_by", "retries", "pgn") if getattr(args, name) is not None]
    if played and args.suite not in GAME_SUITES:
        parser.error(f"--{played[0]} says how games are played; leave it out with --suite {args.suite}")
    if args.retries is not None and args.retries < 0:
        parser.error(f"--retries must be 0 or more; got {args.retries}")
    if args.suite in FILE_SUITES and args.dataset is None:
        parser.error(f"--suite {args.suite} needs its file; give it with --dataset")
    for name in ("output", "pgn"):
        if (file := getattr(args, name)) and file.is_dir():
            parser.error(f"--{name} {file} is a folder; give the name of a file")
    return args


def held_out(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Evaluate on held-out rows, compare with the baseline, print both; return what --output writes."""
    baseline = None
    if args.baseline:
        with blame("--baseline", args.baseline):
            baseline = read_evaluation(args.baseline)
    if args.dataset:
        options = DataOptions(**{option.name: getattr(args, option.name) for option in fields(DataOptions)})
        dataset = load_prompts(args.dataset, args.split, options)
    else:
        dataset = load_shipped(args.split)
    rows = list(draw_of_each(dataset, dict.fromkeys(PREFIXES, args.limit)) if args.limit else dataset)
    modes = MODES if args.mode == "both" else (args.mode,)
    evaluation = evaluate(model, tokenizer, rows, modes=modes, temperature=args.temperature, **common_options(args))
    print(evaluation_table(evaluation))
    source = {"source": args.dataset or "shipped", "split": args.split, "rows": len(rows), "sha256": data_hash(rows)}
    result = {"data": source, **evaluation.to_dict()}
    if baseline is not None:
        comparison, groups = compare(baseline, evaluation), compare_groups(baseline, evaluation)
        result |= {"comparison": comparison, "groups": groups}
        print(f"\n{args.baseline} -> {args.model}\n\n{comparison_table(comparison, groups=groups)}")
    return result


def suite(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Run a suite in each mode and print it; return what --output writes."""
    results = []
    for mode in MODES if args.mode == "both" else (args.mode,):
        options = {"temperature": args.temperature if mode == "sampled" else 0.0, **common_options(args)}
        if args.suite == "selfplay":
            del options["batch_size"]  # all games move together
            results.append(run_selfplay(model, tokenizer, games=args.limit or 100, **options))
        else:
            read, measure = FILE_SUITES[args.suite]
            positions = read(args.dataset)
            drawn = sorted(
                random.Random(0).sample(range(len(positions)), min(args.limit or len(positions), len(positions)))
            )
            results.append(measure(model, tokenizer, [positions[i] for i in drawn], **options))
        print(suite_table(results[-1]), end="\n\n")
    return {"suites": [result.to_dict() for result in results]}


def games(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Play the ladder or llm_chess's game and print the table; return what --output writes."""
    retries = args.retries if args.retries is not None else 2 * (args.suite == "llm_chess")
    player = ModelPlayer(
        model,
        tokenizer,
        name="rookworld-nano" if args.model == str(NANO) else Path(args.model).name,
        move_by=args.move_by or "best",
        temperature=args.temperature if args.mode == "sampled" else 0.0,
        retries=retries,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    if args.suite == "llm_chess":
        result = run_llm_chess(player, games=args.limit or 100, seed=args.seed, progress=True)
    else:
        with standard_anchors(args.seed) as anchors:
            result = run_ladder(player, *anchors, openings=args.limit or OPENINGS, seed=args.seed, progress=True)
    if args.pgn:
        args.pgn.write_text("\n".join(game.pgn(args.suite, str(n)) for n, game in enumerate(result.games, 1)))
    print(ladder_table(result))
    return {"suites": [{**result.to_dict(), "move_by": args.move_by or "best", "retries": retries}]}


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "batch_size", "seed")
    return {name: getattr(args, name) for name in names} | {"progress": True}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as told, print the tables, return what --output writes."""
    with blame("--device", args.device):
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"torch has no such device here ({str(error).splitlines()[0]})") from error
    if args.suite == "ladder":
        find_engine()
    model, tokenizer = load(args.model, leading_eos=args.leading_eos)
    print(f"{args.model}\n")
    measure = held_out if args.suite == "held_out" else games if args.suite in GAME_SUITES else suite
    measured = measure(args, model.to(args.device), tokenizer)
    return {"command": command(), "model": args.model, "versions": versions(), **measured}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with bad_input():
        for file in filter(None, (args.output, args.pgn)):
            file.parent.mkdir(parents=True, exist_ok=True)
        result = run(args)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"\nWrote {args.output}")


if __name__ == "__main__":
    run_program(main)
