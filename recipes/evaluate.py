"""Measure models: held-out positions, mate in one, tactics, test suites and puzzles from files, games.

    python recipes/evaluate.py
    python recipes/evaluate.py --model runs/demo/checkpoint --output after.json --baseline before.json
    python recipes/evaluate.py --model nano runs/demo/checkpoint --suite tactics ladder    # before -> after
    python recipes/evaluate.py --dataset STS1-STS15_LAN_v8.epd lichess_db_puzzle.csv.zst --max_rows 20000 --limit 1000
    python recipes/evaluate.py --dataset games.pgn --best_move engine --limit 500
    python recipes/evaluate.py --suite ladder --pgn games.pgn

Prints tables with 95 % intervals, over games where rows come from games, else over rows, if these are ten or more, and
trivial players beside them. --output keeps every item's or game's result as JSON, and the models side by side as
Markdown.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from rookworld_trl.checkpointing.stopping import run_program
from rookworld_trl.chess import PREFIXES, position_key
from rookworld_trl.chess.accuracy import MODES, evaluate
from rookworld_trl.chess.dataset import MATES_FILE, TACTICS_FILES, draw_of_each, load_shipped, positions_of
from rookworld_trl.chess.ladder import Ladder, ladder_table, run_ladder, standard_anchors
from rookworld_trl.chess.play import ModelPlayer, random_openings
from rookworld_trl.chess.problems import Ask, is_problem_file, read_problems, run_problems
from rookworld_trl.chess.seen import SHIPPED, Source, TrainingData, known_training_data, unseen
from rookworld_trl.chess.sources import DataOptions, load_prompts
from rookworld_trl.files import write_atomically
from rookworld_trl.measuring import Result, against, comparison_table, overview, read_results, result_table
from rookworld_trl.modeling.completions import complete, fitting_length
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.reports.summary import command, versions
from rookworld_trl.settings.parser import bad_input, blame, option, parse
from rookworld_trl.settings.terminal import TerminalOptions, progress_bar, shown

SUITES = ("held_out", "tactics", "mate_in_one", "ladder")


@dataclass
class EvaluationOptions(DataOptions, TerminalOptions):
    """What to measure, and how."""

    model: list[str] = option([NANO], "Folders, or names on the Hub.")
    model_revision: str | None = option(None, "Branch, tag or commit of the models on the Hub.", aliases="--revision")
    suite: list[str] = option(
        [], f"What to measure: {', '.join(SUITES)}; default: held_out, unless problems of --dataset are all."
    )
    split: str = option("test", "Split of the shipped data and of tactics: dev or test.")
    dataset: list[str] = option(
        [],
        "Files of problems (EPD, Lichess's puzzles); rows to hold out: a file, or a Hub's name and --split.",
    )
    limit: int | None = option(
        None, "Measure only so many rows of each task and problems of each file, drawn at random, alike in every run."
    )
    games: int = option(100, "Games of each of the ladder's pairings.")
    mode: Literal["greedy", "sampled", "both"] = option("both", "Decoding; against players, `both` is greedy.")
    temperature: float = option(1.0, "Temperature of the sampled mode.")
    seed: int = option(0, "Of samples, games and openings.")
    batch_size: int = option(64, "Prompts decoded at a time.")
    max_new_tokens: int = option(144, "Tokens of a completion, at most; fewer where the model's context ends.")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "Where the models run.")
    trained_on: list[str] | None = option(
        None,
        "What the models were trained on: `shipped`, files, names on the Hub; nothing behind it: unknown. Items that "
        "show one of its positions are left out. Default: shipped, and the data that a run's summary.json names.",
    )
    baseline: Path | None = option(
        None, "JSON of an earlier evaluation to compare each model with, item by item; default: the first --model."
    )
    output: Path | None = option(None, "File for everything, as JSON; the overview stands beside it as .md.")
    pgn: Path | None = option(None, "File that the ladder's games are written to, illegal moves replaced.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problems = [Path(name) for name in self.dataset if is_problem_file(Path(name))]
        rows = [name for name in self.dataset if Path(name) not in self.problems]
        self.rows = rows[0] if rows else None
        self.suite = self.suite or ([] if self.problems and not rows else ["held_out"])
        self.modes = MODES if self.mode == "both" else (self.mode,)
        for wrong, message in self.contradictions(rows):
            if wrong:
                raise ValueError(message)

    @cached_property
    def training(self) -> TrainingData:
        """What the models were trained on, as far as it is known."""
        if self.trained_on is None:
            return known_training_data(self.model)
        unknown = [] if self.trained_on else ["all that the models were trained on"]
        return TrainingData([Source(name) for name in self.trained_on], unknown)

    def contradictions(self, rows: Sequence[str]) -> Iterator[tuple[Any, str]]:
        """What is wrong, if it is, in one line each."""
        for name in set(self.suite) - set(SUITES):
            yield True, f"--suite {name}: there is none of this name; write one of {', '.join(SUITES)}"
        for each in fields(DataOptions):
            changed = getattr(self, each.name) != each.default and each.name not in ("leading_eos", "max_rows")
            yield changed and not rows, f"--{each.name} says how the rows of --dataset are read, and there are none"
        for name in ("limit", "batch_size", "max_new_tokens", "temperature"):
            value = getattr(self, name)
            yield value is not None and value <= 0, f"--{name} must be above 0; got {value}"
        odd = f"--games must be even and 2 or more, for openings are played with both colours; got {self.games}"
        yield self.games < 2 or self.games % 2, odd
        if rows:
            asked = "held_out" in self.suite
            yield not asked, f"--dataset {rows[0]} holds no problems: give problems, or add `--suite held_out` for rows"
        splits = " and ".join(TACTICS_FILES)
        unknown = "tactics" in self.suite and self.split not in TACTICS_FILES
        yield unknown, f"--split {self.split}: the suite tactics has the splits {splits}"
        yield len(rows) > 1, f"--dataset takes one source of rows; got {', '.join(rows)}"
        idle = self.pgn is not None and "ladder" not in self.suite
        yield idle, "--pgn says where the ladder's games are written; leave it out without the suite ladder"
        for name in ("output", "pgn"):
            file = getattr(self, name)
            yield file and file.is_dir(), f"--{name} {file} is a folder; give the name of a file"


def plan(args: EvaluationOptions) -> tuple[Dataset | None, dict[str, Callable[[Ask], Result]]]:
    """The rows to hold out, and the suites that need nothing but completions, by name; every input is checked."""
    rows = None
    if "held_out" in args.suite:
        dataset = load_prompts(args.rows, args.split, args) if args.rows else load_shipped(args.split)
        shown = [positions_of(row["prompt"], row["target"]) for row in dataset]
        rows = dataset.select(unseen(shown, args.rows or SHIPPED, args.training))
        rows = draw_of_each(rows, dict.fromkeys(PREFIXES, args.limit)) if args.limit else rows
    split: Any = args.split
    files = {file.name: (file, args.max_rows) for file in args.problems}
    files |= {"tactics": (TACTICS_FILES[split], None)} if "tactics" in args.suite else {}
    files |= {"mate in one": (MATES_FILE, None)} if "mate_in_one" in args.suite else {}
    suites: dict[str, Callable[[Ask], Result]] = {}
    for name, (file, max_rows) in files.items():
        problems = read_problems(file, max_rows)
        shown = [[position_key(board.fen()) for board in each.boards] for each in problems]
        numbers = unseen(shown, file, args.training)
        drawn = random.Random(0).sample(numbers, min(args.limit or len(numbers), len(numbers)))
        suites[name] = partial(run_problems, problems=[problems[number] for number in sorted(drawn)], name=name)
    return rows, suites


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], title: str, **settings: Any) -> list[str]:
    """One completion of each prompt, as long as the model's context lets it be."""
    settings["max_new_tokens"] = fitting_length(model, tokenizer, prompts, settings["max_new_tokens"])
    with progress_bar(title, len(prompts), "prompt") as bar:
        return [each.text for each in complete(model, tokenizer, prompts, told=bar.update, **settings)]


def play(args: EvaluationOptions, model: Any, tokenizer: Any, **limits: Any) -> Ladder:
    """Play the ladder."""
    mode = "sampled" if args.mode == "sampled" else "greedy"
    temperature = args.temperature if mode == "sampled" else 0.0
    player = ModelPlayer(model, tokenizer, temperature=temperature, **limits)
    with standard_anchors(args.seed) as anchors:
        fens = random_openings(args.games // 2, args.seed)
        result = run_ladder(player, anchors, openings=fens, seed=args.seed, mode=mode, progress=True)
    result.settings.update(temperature=temperature)
    return result


def names_of(models: Sequence[str]) -> list[str]:
    """Short names of the models as given, for tables and games: the last part of a path where that tells them apart."""
    short = ["rookworld-nano" if name == NANO else Path(name).name for name in models]
    named = [one if short.count(one) == 1 else name for one, name in zip(short, models, strict=True)]
    return [name if named.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(named, 1)]


def measure(args: EvaluationOptions, model: Any, tokenizer: Any, name: str, planned: Any) -> list[Result]:
    """Measure one model and print its tables."""
    rows, suites = planned
    limits: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "seed": args.seed}
    found: list[Result] = []
    if rows is not None:
        sampling: Any = {"modes": args.modes, "temperature": args.temperature}
        found += evaluate(model, tokenizer, rows, progress=True, **sampling, **limits)
        print(result_table(found), end="\n\n")
    for suite in suites.values():
        of_suite = []
        for mode in args.modes:
            settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
            settings |= {"temperature": args.temperature if mode == "sampled" else 0.0}
            result = suite(partial(answers, model, tokenizer, batch_size=args.batch_size, **settings))
            of_suite.append(replace(result, mode=mode, settings=result.settings | settings))
        print(result_table(of_suite), end="\n\n")
        found += of_suite
    if "ladder" in args.suite:
        found.append(played := play(args, model, tokenizer, name=name, **limits))
        print(ladder_table(played), end="\n\n")
    return found


def run(args: EvaluationOptions) -> tuple[dict[str, Any], str]:
    """Evaluate as told and print the tables; return what --output writes, and the overview."""
    with blame("--device", args.device):
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"torch has no such device here ({str(error).splitlines()[0]})") from error
    trained_on, planned = args.training, plan(args)
    earlier = None
    if args.baseline:
        with blame("--baseline", args.baseline):
            earlier = read_results(args.baseline)
            names = [name for name in PREFIXES if planned[0] is not None and name in planned[0]["task"]]
            for name, mode in ((name, mode) for name in (*names, *planned[1]) for mode in args.modes):
                if (name, mode) not in earlier:
                    raise ValueError(f"it has no '{name}', {mode}; measure it with the same suites and --mode")
    models: dict[str, list[Result]] = {}
    written: list[dict[str, Any]] = []
    for name, label in zip(args.model, names_of(args.model), strict=True):
        model, tokenizer = load(name, leading_eos=args.leading_eos, revision=args.model_revision)
        commit = getattr(model.config, "_commit_hash", None)  # of the Hub
        print(f"{name}\n")
        results = models[label] = measure(args, model.to(args.device), tokenizer, label, planned)
        facts: dict[str, Any] = {"name": label, "model": name, "revision": args.model_revision, "commit": commit}
        written.append({**facts, "results": [each.to_dict() for each in results]})
        first = {(each["name"], each["mode"]): each for each in written[0]["results"]} if len(written) > 1 else None
        if (compared := earlier or first) is not None:
            comparison, groups = against(results, compared)
            written[-1] |= {"comparison": comparison, "groups": groups}
            print(f"{args.baseline or args.model[0]} -> {name}\n\n{comparison_table(comparison, groups=groups)}\n")
    unknown = str(trained_on) if args.problems or {"held_out", "tactics", "mate_in_one"} & set(args.suite) else ""
    table = "\n\n".join([overview(models), *([unknown] if unknown else [])])
    if len(models) > 1 or len(planned[1]) + len(args.suite) > 1:
        print(table)
    elif unknown:
        print(unknown)
    source: dict[str, Any] = {"source": args.rows or SHIPPED, "split": args.split}
    source |= {"trained_on": [each.name for each in trained_on.sources], "unknown": trained_on.unknown}
    if planned[0] is not None:
        report, text = planned[0].info.description, json.dumps(list(planned[0]), sort_keys=True)
        source |= {"rows": len(planned[0]), "sha256": hashlib.sha256(text.encode()).hexdigest(), "report": report}
    if args.pgn:
        played = [each.pgn() for results in models.values() for each in results if isinstance(each, Ladder)]
        write_atomically(args.pgn, "\n".join(played))
    return {"command": command(), "versions": versions(), "data": source, "models": written}, table


def main(arguments: Sequence[str] | None = None) -> None:
    with ExitStack() as stack:
        stack.enter_context(bad_input())
        (args,) = parse((EvaluationOptions,), arguments, __doc__)
        shown_result = stack.enter_context(shown(args))
        result, table = run(args)
        shown_result |= result
        if args.output:
            write_atomically(args.output, json.dumps(result, indent=1) + "\n")
            write_atomically(args.output.with_suffix(".md"), table + "\n")
            print(f"\nWrote {args.output} and {args.output.with_suffix('.md').name}")


if __name__ == "__main__":
    run_program(main)
