"""Measure models: held-out positions, mate in one, tactics, test suites and puzzles from files, self-play, games.

    python recipes/evaluate.py
    python recipes/evaluate.py --model runs/demo/checkpoint --output after.json --baseline before.json
    python recipes/evaluate.py --model nano runs/demo/checkpoint --suite held_out tactics mate_in_one ladder
    python recipes/evaluate.py --dataset STS1-STS15_LAN_v8.epd lichess_db_puzzle.csv.zst --max_rows 20000 --limit 1000
    python recipes/evaluate.py --dataset games.pgn --best_move engine --limit 500
    python recipes/evaluate.py --suite selfplay closed_loop ladder --pgn games.pgn

Prints tables with 95 % intervals, over games where rows come from games, else over rows, if these are ten or more, and
trivial players beside them. --output keeps every item's or game's result as JSON, and the models side by side as
Markdown.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from rookworld_trl.help import show_help

    show_help(__file__)

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from datasets import Dataset

from rookworld_trl.checkpointing.exits import run_program
from rookworld_trl.chess import PREFIXES, check_tasks, position_key
from rookworld_trl.chess.accuracy import MODES, evaluate
from rookworld_trl.chess.dataset import MATES_FILE, TACTICS_FILES, load_shipped
from rookworld_trl.chess.ladder import ANCHOR_KINDS, Ladder, choose_anchors, ladder_table, run_ladder, standard_anchors
from rookworld_trl.chess.openings import random_openings
from rookworld_trl.chess.players import ModelPlayer
from rookworld_trl.chess.problem_files import is_problem_file, read_problems
from rookworld_trl.chess.problems import Problem, run_problems
from rookworld_trl.chess.seen import SHIPPED, Source, TrainingData, known_training_data, unseen
from rookworld_trl.chess.selfplay import run_selfplay
from rookworld_trl.chess.sources import DataOptions, load_prompts
from rookworld_trl.chess.splits import draw_of_each, positions_of
from rookworld_trl.chess.suite import Ask, ModelAnswers, SuiteResult
from rookworld_trl.config import bad_input, blame
from rookworld_trl.files import write_atomically
from rookworld_trl.measuring.results import ModelResults, data_hash, names_of, overview, read_baseline
from rookworld_trl.measuring.tables import comparison_table, evaluation_table, suite_table
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.reports.summary import command, versions
from rookworld_trl.terminal import add_options, shown

SUITES = ("held_out", "tactics", "mate_in_one", "selfplay", "closed_loop", "ladder")
TASK_SAMPLING = {"temperature": (int, float), "max_completion_length": (int,)}
READING = [option for option in fields(DataOptions) if option.name not in ("leading_eos", "max_rows")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=[NANO], help="Folders, or names on the Hub; default: rookworld-nano.")
    add(
        "--model_revision",
        "--revision",
        nargs="+",
        default=[],
        help="Branch, tag or commit of each --model; or of all.",
    )
    add("--leading_eos", action="store_true", help="Put the end token in front of every prompt.")
    about = "What to measure, beside the problems of --dataset; default: held_out, unless those are all that is asked."
    add("--suite", nargs="+", choices=SUITES, help=about)
    add("--split", default="test", help="Split of the shipped data and of tactics: dev or test.")
    about = "Files of problems (EPD, Lichess's puzzles); rows to hold out, instead of the "
    add("--dataset", nargs="+", default=[], help=about + "shipped ones: a file, or a name on the Hub and its --split.")
    add("--max_rows", type=int, help="Read only so many rows of each --dataset; default: all.")
    about = "Measure only so many rows of each task and problems of each file, drawn at random, the same in every run."
    add("--limit", type=int, help=about)
    about = "Games of selfplay and closed_loop, and of each of the ladder's pairings; default: 100."
    add("--games", type=int, default=100, help=about)
    add("--mode", choices=(*MODES, "both"), default="both", help="Decoding; default: both, but greedy against players.")
    add("--temperature", type=float, default=1.0, help="Temperature of the sampled mode.")
    about = "By task, `temperature` and `max_completion_length`, as in recipes/grpo.py: '{policy: {temperature: 0.7}}'."
    add("--task_sampling", type=yaml.safe_load, help=about)
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=64, help="Prompts decoded at a time.")
    about = "Tokens of a completion, at most; fewer where the model's context ends."
    add("--max_new_tokens", type=int, default=144, help=about)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    about = "What the models were trained on: `shipped`, files, names on the Hub; nothing behind it: unknown. Default: "
    add("--trained_on", nargs="*", help=about + "shipped, and the data that a model's run names in its summary.json.")
    about = "What becomes of items of --dataset that show a position of --trained_on; default: refuse."
    add("--seen", choices=("refuse", "drop"), default="refuse", help=about)
    add("--baseline", type=Path, help="JSON of an earlier evaluation to compare each model with, item by item.")
    add(
        "--output", type=Path, help="File that everything is written to, as JSON; the overview stands beside it as .md."
    )
    playing = parser.add_argument_group("How models play, in the suite ladder")
    playing.add_argument("--move_by", choices=("best", "evals"), help="B: or the highest eval; default: best.")
    about = "Sample an illegal move again so often; default: 0."
    playing.add_argument("--retries", type=int, help=about)
    about = "simple is without Stockfish. Default: reproducible, or simple where there is no Stockfish."
    playing.add_argument("--anchors", choices=ANCHOR_KINDS, help=about)
    playing.add_argument("--pgn", type=Path, help="File that the games are written to, illegal moves replaced.")
    reading = parser.add_argument_group("How the rows of --dataset are read, as in recipes/grpo.py")
    for option in READING:
        kind = get_type_hints(DataOptions)[option.name]
        how: dict[str, Any] = {"type": int if kind in (int, int | None) else str}
        if get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        elif kind is bool:
            how = {"action": "store_true"}
        about = f"{option.metadata['help']} [{option.default}]".replace("%", "%%")
        reading.add_argument(f"--{option.name}", default=option.default, help=about, **how)
    add_options(parser)
    args = parser.parse_args(arguments)
    args.problems = [Path(name) for name in args.dataset if is_problem_file(Path(name))]
    rows = [name for name in args.dataset if Path(name) not in args.problems]
    args.rows = rows[0] if rows else None
    if args.trained_on is None:
        args.training = known_training_data(args.model)
    else:
        nothing = [] if args.trained_on else ["all that the models were trained on"]
        args.training = TrainingData([Source(name) for name in args.trained_on], nothing, named=True)
    args.suite = args.suite or ([] if args.problems and not rows else ["held_out"])
    check(parser, args, rows)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, rows: Sequence[str]) -> None:
    """Settings that contradict each other, in one line each."""
    changed = [option.name for option in READING if getattr(args, option.name) != option.default]
    if changed and not rows:
        parser.error(f"--{changed[0]} says how the rows of --dataset are read, and there are none; leave it out")
    for name in ("limit", "max_rows", "batch_size", "max_new_tokens", "temperature"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} must be above 0; got {value}")
    if args.games < 2 or args.games % 2:
        parser.error(f"--games must be even and 2 or more, for openings are played with both colours; got {args.games}")
    if rows and "held_out" not in args.suite:
        parser.error(f"--dataset {rows[0]} holds no problems: give problems, or add `--suite held_out` for rows")
    if "tactics" in args.suite and args.split not in TACTICS_FILES:
        parser.error(f"--split {args.split}: the suite tactics has the splits {' and '.join(TACTICS_FILES)}")
    if len(rows) > 1:
        parser.error(f"--dataset takes one source of rows; got {', '.join(rows)}")
    if len(args.model_revision) not in (0, 1, len(args.model)):
        parser.error(f"--model_revision: give one, or one for each of the {len(args.model)} models")
    for name in ("move_by", "retries", "pgn"):
        if getattr(args, name) is not None and "ladder" not in args.suite:
            parser.error(f"--{name} says how games are played; leave it out without the suite ladder")
    if args.retries is not None and args.retries < 0:
        parser.error(f"--retries must be 0 or more; got {args.retries}")
    for name in ("output", "pgn"):
        if (file := getattr(args, name)) and file.is_dir():
            parser.error(f"--{name} {file} is a folder; give the name of a file")
    sampling = {} if args.task_sampling is None else args.task_sampling
    try:
        check_tasks("--task_sampling", sampling)
        right = all(isinstance(own[k], TASK_SAMPLING[k]) and own[k] > 0 for own in sampling.values() for k in own)
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"--task_sampling: {error}; write it like {{policy: {{temperature: 0.7}}}}")
    if not right:
        parser.error(f"--task_sampling: {args.task_sampling}; write numbers above 0")


def plan(args: argparse.Namespace) -> tuple[Dataset | None, dict[str, Callable[[Ask], SuiteResult]]]:
    """The rows to hold out, and the suites that need nothing but completions, by name; every input is checked."""
    trained_on: dict[str, Any] = {"trained_on": args.training, "drop": args.seen == "drop"}
    rows = None
    if "held_out" in args.suite:
        options = DataOptions(**{option.name: getattr(args, option.name) for option in fields(DataOptions)})
        dataset = load_prompts(args.rows, args.split, options) if args.rows else load_shipped(args.split)
        rows = dataset.select(unseen(dataset, row_positions, args.rows or SHIPPED, **trained_on))
        rows = draw_of_each(rows, dict.fromkeys(PREFIXES, args.limit)) if args.limit else rows
    files = {file.name: (file, args.max_rows) for file in args.problems}
    files |= {"tactics": (TACTICS_FILES[args.split], None)} if "tactics" in args.suite else {}
    files |= {"mate in one": (MATES_FILE, None)} if "mate_in_one" in args.suite else {}
    suites: dict[str, Callable[[Ask], SuiteResult]] = {}
    for name, (file, max_rows) in files.items():
        problems = read_problems(file, max_rows)
        numbers = unseen(problems, problem_positions, file, **trained_on)
        drawn = random.Random(0).sample(numbers, min(args.limit or len(numbers), len(numbers)))
        suites[name] = partial(run_problems, problems=[problems[number] for number in sorted(drawn)], name=name)
    for suite, name in (("selfplay", "self-play"), ("closed_loop", "closed loop")):
        if suite in args.suite:
            go_on = suite == "closed_loop"
            suites[name] = partial(run_selfplay, games=args.games, seed=args.seed, go_on=go_on, progress=True)
    return rows, suites


def row_positions(row: Mapping[str, Any]) -> list[str]:
    return positions_of(row["prompt"], row["target"])


def problem_positions(problem: Problem) -> list[str]:
    return [position_key(board.fen()) for board in problem.boards]


def play(args: argparse.Namespace, model: Any, tokenizer: Any, **limits: Any) -> Ladder:
    """Play the ladder."""
    settings: dict[str, Any] = {"move_by": args.move_by or "best", "retries": args.retries or 0}
    settings |= {"temperature": temperatures(args, "sampled" if args.mode == "sampled" else "greedy")["policy"]}
    player = ModelPlayer(model, tokenizer, **settings, **limits)
    with standard_anchors(args.seed, args.anchors) as anchors:
        fens = random_openings(args.games // 2, args.seed)
        result = run_ladder(player, anchors, openings=fens, seed=args.seed, progress=True)
    result.settings.update(settings)
    return result


def temperatures(args: argparse.Namespace, mode: str) -> dict[str, float]:
    """By task."""
    own = args.task_sampling or {}
    of_task = {str(task): own.get(task, {}).get("temperature", args.temperature) for task in PREFIXES}
    return of_task if mode == "sampled" else dict.fromkeys(of_task, 0.0)


def measure(args: argparse.Namespace, model: Any, tokenizer: Any, results: ModelResults, planned: Any) -> None:
    """Measure one model, print its tables, fill its results."""
    modes = MODES if args.mode == "both" else (args.mode,)
    rows, suites = planned
    limits = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "seed": args.seed}
    if rows is not None:
        sampling = {"temperature": args.temperature, "task_sampling": args.task_sampling}
        results.held_out = evaluate(model, tokenizer, rows, modes=modes, progress=True, **sampling, **limits)
        print(evaluation_table(results.held_out), end="\n\n")
    at_once = max(args.batch_size, args.games)  # games' equal positions are sampled once each within a batch alone
    for suite in suites.values():
        for mode in modes:
            settings = {
                "temperature": temperatures(args, mode),
                "max_new_tokens": args.max_new_tokens,
                "seed": args.seed,
            }
            result = suite(ModelAnswers(model, tokenizer, batch_size=at_once, progress=True, **settings))
            result.settings.update(settings)
            results.suites.append((mode, result))
            print(suite_table(result), end="\n\n")
    if "ladder" in args.suite:
        played = play(args, model, tokenizer, name=results.name, **limits)
        results.suites.append(("sampled" if args.mode == "sampled" else "greedy", played))
        print(ladder_table(played), end="\n\n")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Evaluate as told and print the tables; return what --output writes, and the overview."""
    with blame("--device", args.device):
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"torch has no such device here ({str(error).splitlines()[0]})") from error
    if "ladder" in args.suite:
        args.anchors = choose_anchors(args.anchors)
    planned = plan(args)
    baseline = None
    if args.baseline:
        modes = MODES if args.mode == "both" else (args.mode,)
        with blame("--baseline", args.baseline):
            baseline = read_baseline(args.baseline)
            baseline.check(planned[0] is not None, [(name, mode) for name in planned[1] for mode in modes])
    revisions = args.model_revision or [None]
    models, written = [], []
    revisions *= len(args.model) // len(revisions)
    for name, label, revision in zip(args.model, names_of(args.model), revisions, strict=True):
        model, tokenizer = load(name, leading_eos=args.leading_eos, revision=revision)
        commit = getattr(model.config, "_commit_hash", None)  # of the Hub
        models.append(ModelResults(label, {"model": name, "revision": revision, "commit": commit}))
        print(f"{name}\n")
        measure(args, model.to(args.device), tokenizer, models[-1], planned)
        written.append(models[-1].to_dict())
        if baseline:
            comparison, groups = models[-1].against(baseline)
            written[-1] |= {"comparison": comparison, "groups": groups}
            print(f"{args.baseline} -> {name}\n\n{comparison_table(comparison, groups=groups)}\n")
    unknown = str(args.training) if args.problems or {"held_out", "tactics", "mate_in_one"} & set(args.suite) else ""
    table = "\n\n".join([overview(models), *([unknown] if unknown else [])])
    if len(models) > 1 or len(planned[1]) + len(args.suite) > 1:
        print(table)
    elif unknown:
        print(unknown)
    source = {"source": args.rows or SHIPPED, "split": args.split, "seen": args.seen}
    source |= {"trained_on": [each.name for each in args.training.sources], "unknown": args.training.unknown}
    if planned[0] is not None:
        report = planned[0].info.description
        source |= {"rows": len(planned[0]), "sha256": data_hash(list(planned[0])), "report": report}
    if args.pgn:
        played = [suite.pgn() for model in models for _, suite in model.suites if isinstance(suite, Ladder)]
        write_atomically(args.pgn, "\n".join(played))
    return {"command": command(), "versions": versions(), "data": source, "models": written}, table


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with bad_input(), shown(args) as shown_result:
        result, table = run(args)
        shown_result |= result
        if args.output:
            write_atomically(args.output, json.dumps(result, indent=1) + "\n")
            write_atomically(args.output.with_suffix(".md"), table + "\n")
            print(f"\nWrote {args.output} and {args.output.with_suffix('.md').name}")


if __name__ == "__main__":
    run_program(main)
