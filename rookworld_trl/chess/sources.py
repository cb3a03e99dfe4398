"""Prompts from a user's own data: a Parquet, JSON Lines, CSV, text or PGN file, or a name on the Hub.

Rows with the column `prompt` are checked one by one (about 0.1 ms each, once, before anything trains; a bad row found
in hour three costs more) and the first bad one is an error. Rows with the column `text`, as `jrahn/rookworld_7m` has
them, go through `rookworld_trl.chess.rookworld`, which leaves bad ones out and counts them.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import chess
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset

from rookworld_trl.chess import ParseError, environment, policy, task_of
from rookworld_trl.chess.dataset import Report, positions_of, row_of
from rookworld_trl.chess.engine import MATE_CENTIPAWNS, EnginePool, ValueCache
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.pgn import rows_of_games
from rookworld_trl.chess.rookworld import TEXT_COLUMN, convert_rows
from rookworld_trl.chess.strata import phase, stratum
from rookworld_trl.settings.parser import option
from rookworld_trl.settings.terminal import with_bar

PGN = "pgn"
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".pgn": PGN}
KINDS = f"{', '.join(READERS)}, or one of them gzipped (.gz)"
SHUFFLE_BUFFER = 10_000  # rows of a stream held back at a time to be drawn from
CHUNK = 50_000  # rows that are Python objects at a time; as Arrow they take a tenth of the memory
_TEXTS = ("prompt", "task", "target", "stratum", "game")  # a game's name, empty where none is known
_LISTS = {"legal_moves": List(Value("string")), "legal_cp": List(Value("int32"))}
FEATURES = Features({name: Value("string") for name in _TEXTS} | _LISTS)


@dataclass
class DataOptions:
    """How prompts are read, repaired and written; the defaults fit `jrahn/rookworld_7m`."""

    best_move: Literal["engine"] | None = option(
        None,
        "`engine`: Stockfish values the moves of `P:` rows that carry no values, and so decides the best of them; rows "
        "with a `text` column and PGN files need it.",
    )
    engine_nodes: int = option(
        80_000,
        "Nodes a position for `best_move` `engine`. 80000 take about 0.1 s of one core and find the answers of 99 % of "
        "Lichess's puzzles; 8000 take a tenth of the time and find 91 %.",
    )
    engine_cache: str | None = option(
        "~/.cache/rookworld-trl/engine-values.sqlite", "File that keeps the engines' answers; empty: none."
    )
    streaming: bool = option(False, "Read a data set of the Hub row by row instead of downloading all of it first.")
    max_rows: int | None = option(
        None, "Rows to read. A stream needs it, and draws them from a shuffled buffer; default: all."
    )
    leading_eos: bool = option(
        False, "Put the end token in front of every prompt, as in the documents that RookWorld-LM was trained on."
    )

    def __post_init__(self) -> None:
        for name in ("max_rows", "engine_nodes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}: nothing would be read. Set it to 1 or more, or leave it out")
        if self.streaming and self.max_rows is None:
            raise ValueError("`streaming` is true, but a stream is read up to `max_rows`: set that, to 100000 say")


def load_prompts(source: str, split: str = "train", options: DataOptions | None = None) -> Dataset:
    """Read prompts and check every row.

    A file or a data set of the Hub with the column `prompt` also needs, for `P:` rows, `legal_moves` (every legal
    move, UCI) and `legal_cp` (the value of each in centipawns, mover's view, mates as +-(10000 - plies)); with
    `best_move="engine"` engines value the rows that have neither. The rest is filled in where it is missing: `task`
    and `stratum` from the prompt, `target` of `A:` rows by python-chess. Lists in a CSV file are JSON texts.
    With the column `text` instead, rows are taken as `jrahn/rookworld_7m` writes them. A PGN file gives `A:` rows and,
    with `best_move="engine"`, `P:` rows. What was left out or repaired of these two is printed.

    Args:
        source: a file, or a data set's name on the Hub.
        split: of a data set on the Hub; a file is one split.
        options: defaults: those of `DataOptions`.

    Returns:
        A data set with the columns `FEATURES`; what was printed stands in its `info.description`, too.

    Raises:
        ValueError: naming source, row and field, and what to do about it.
    """
    options, report = options or DataOptions(), Report()
    rows: Iterator[dict[str, Any]]
    valued = options.best_move == "engine"
    if reader_of(Path(source)) == PGN:
        _check_file(source)
        rows = islice(rows_of_games(Path(source), report, positions=valued), options.max_rows)
    else:
        given, columns = open_rows(source, split, options)
        if "prompt" in columns:
            rows = _checked_rows(source, given, valued)
        elif TEXT_COLUMN in columns:
            rows = _rows_of_text(source, given, report, valued)
        else:
            raise ValueError(
                f"{source}: column 'prompt' is missing (found: {', '.join(columns)}). "
                "Add it, with texts like 'P: <FEN>' or 'A: <FEN>+<move>+<last moves>+'; or give whole rows in a column "
                f"'{TEXT_COLUMN}'"
            )
    if valued:
        rows = _valued(rows, options, report)
    chunks = []
    counted = with_bar(rows, f"read {Path(source).name}", options.max_rows, "row")
    while chunk := list(islice(counted, CHUNK)):
        chunks.append(Dataset.from_list(chunk, features=FEATURES))
    if not chunks:
        raise ValueError(f"{source}: has no rows that can be used. Give a data set with at least one prompt")
    dataset = concatenate_datasets(chunks)
    dataset.info.description = str(report)
    if report.counts:
        print(f"{source}: {report}")
    if reader_of(Path(source)) == PGN and not valued:
        print(f"{source}: no P: rows, for games carry no values of moves; `best_move: engine` makes them, by Stockfish")
    return dataset


def open_rows(source: str, split: str, options: DataOptions) -> tuple[Iterator[Mapping[str, Any]], list[str]]:
    """The rows of a file or of a data set of the Hub as they stand there, `max_rows` at most, and their columns.

    Raises:
        ValueError: it cannot be read.
    """
    reader = reader_of(Path(source))
    if reader:
        _check_file(source)
    elif Path(source).exists():
        raise ValueError(f"{source}: is no data file. Give `dataset` a file ending in {KINDS}")
    # No cache outside of memory: a file that changed must be read again.
    file = {"data_files": source, "split": "train", "keep_in_memory": None if options.streaming else True}
    try:
        dataset = load_dataset(reader or source, streaming=options.streaming, **(file if reader else {"split": split}))
        if options.streaming:  # its first rows are often all of one kind: draw from a buffer, the files in any order
            dataset = dataset.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
        rows = islice(dataset, options.max_rows)
        first = next(rows, None)  # a stream knows its columns by its first row only
    except Exception as error:  # the readers and the Hub raise a dozen unrelated classes
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or repr(error)
        kind = f"cannot be read as {reader}" if reader else f"neither a file here nor split '{split}' of a data set"
        raise ValueError(
            f"`dataset` is '{source}': {kind} ({reason}). Check the name, or write it again; files end in {KINDS}"
        ) from error
    return (iter(()), dataset.column_names or []) if first is None else (chain([first], rows), list(first))


def _checked_rows(source: str, dataset: Iterable[Mapping[str, Any]], values_follow: bool) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(dataset):
        try:
            yield _checked(row, values_follow)
        except ParseError as error:
            raise ValueError(f"{source} row {number}, column 'prompt': {error}") from error
        except ValueError as error:
            raise ValueError(f"{source} row {number}, {error}") from error


def _rows_of_text(
    source: str, dataset: Iterable[Mapping[str, Any]], report: Report, valued: bool
) -> Iterator[dict[str, Any]]:
    for row in convert_rows(dataset, report):
        if row["task"] == "policy" and not valued:
            raise ValueError(
                f"{source} row {report.counts['rows read'] - 1}, column '{TEXT_COLUMN}': a P: row has values of the "
                "moves it lists only. Set `best_move: engine`, and Stockfish values every move, once"
            )
        yield row


def _valued(rows: Iterable[dict[str, Any]], options: DataOptions, report: Report) -> Iterator[dict[str, Any]]:
    with engines(options) as pool:
        yield from with_values(rows, pool, report)


@contextmanager
def engines(options: DataOptions) -> Iterator[EnginePool]:
    """Engines at work, and the file that keeps their answers, as the options say."""
    with ExitStack() as stack:
        cache = None
        if options.engine_cache:
            cache = stack.enter_context(closing(ValueCache(Path(options.engine_cache).expanduser())))
        yield stack.enter_context(EnginePool(os.cpu_count() or 1, nodes=options.engine_nodes, cache=cache))


def reader_of(path: Path) -> str | None:
    """What reads a file of this name; None: nothing does."""
    return READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _check_file(source: str) -> None:
    if not (Path(source).is_file() and Path(source).stat().st_size):
        raise ValueError(f"`dataset` is '{source}': there is no such file, or it is empty")


def _checked(row: Mapping[str, Any], values_follow: bool = False) -> dict[str, Any]:
    """The row with all columns of `FEATURES`; if `values_follow`, a `P:` row may come without values.

    Raises:
        ParseError: the prompt does not parse, or its position is illegal.
        ValueError: another column; the message starts with its name.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"column 'prompt': {prompt!r} is no text. Write 'P: <FEN>' or 'A: <FEN>+<move>+<moves>+'")
    task = task_of(prompt)
    if row.get("task") not in (None, task):
        raise ValueError(f"column 'task': {row['task']!r} contradicts the prompt, which is of '{task}'. Remove it")
    if task == "policy":
        board = board_from_fen(policy.parse_prompt(prompt))
        if not any(board.legal_moves):
            raise ValueError("column 'prompt': the game is over, there is no move to choose. Remove the row")
        bare = values_follow and not row.get("legal_moves") and not row.get("legal_cp")
        moves, values = ([], []) if bare else _legal_values(row, board)
        target, kind = row.get("target") or "", phase(board)
    else:
        given = environment.parse_prompt(prompt)
        board = board_from_fen(given.fen)
        moves, values = [], []
        target = environment.format_completion(environment.transition(given.fen, given.move))
        if (row.get("target") or target).rstrip() != target.rstrip():
            raise ValueError(f"column 'target': {row['target']!r}, but python-chess says {target!r}. Remove the column")
        kind = stratum(board, given.move)
    game = "" if row.get("game") is None else str(row["game"])
    return row_of(task, prompt, target, row.get("stratum") or kind, moves, values, game)


def _listed(cell: Any) -> Any:
    """A list, which CSV can hold as JSON text only."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def _legal_values(row: Mapping[str, Any], board: chess.Board) -> tuple[list[str], list[int]]:
    moves, values = (_listed(row.get(name)) for name in ("legal_moves", "legal_cp"))
    if not isinstance(moves, list) or not isinstance(values, list):
        name = "legal_cp" if isinstance(moves, list) else "legal_moves"
        raise ValueError(
            f"column '{name}': a 'P:' row needs it, found {row.get(name)!r}. Add every legal move with its engine "
            "value (recipes/generate_data.py makes such rows), or set `best_move: engine` and Stockfish finds them"
        )
    if len(moves) != len(values):
        raise ValueError(f"column 'legal_cp': {len(values)} values for {len(moves)} moves. Give one for each")
    moves = [str(move) for move in moves]
    truth = {move.uci() for move in board.legal_moves}
    if len(set(moves)) != len(moves) or set(moves) != truth:
        wrong = sorted(set(moves) ^ truth) or sorted(move for move in moves if moves.count(move) > 1)
        raise ValueError(
            f"column 'legal_moves': not the {len(truth)} legal moves of the position (look at {', '.join(wrong[:3])}). "
            "Give each legal move once, in UCI"
        )
    for value in values:  # 12.0 is 12, as pandas writes a column with gaps
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value != value // 1 or abs(value) > MATE_CENTIPAWNS:
            raise ValueError(
                f"column 'legal_cp': {value!r} is no whole number, or beyond a mate. Give centipawns from the mover's "
                f"side, and a mate in n plies as +-({MATE_CENTIPAWNS} - n)"
            )
    return moves, list(map(int, values))


def without(dataset: Dataset, held_out: Set[str]) -> tuple[Dataset, int]:
    """Drop the rows that show a held-out position (by `position_key`), in their prompt or in their answer.

    Returns:
        What is left, and how many rows were dropped.
    """
    rows = enumerate(zip(dataset["prompt"], dataset["target"], strict=True))
    kept = [number for number, (prompt, target) in rows if held_out.isdisjoint(positions_of(prompt, target))]
    return dataset.select(kept), len(dataset) - len(kept)


def check_lengths(dataset: Dataset, tokenizer: Any, context: int, max_completion_length: int) -> None:
    """Make sure that every prompt leaves room for a completion.

    Raises:
        ValueError: naming the longest prompt, if it doesn't.
    """
    prompts = list(dict.fromkeys(dataset["prompt"]))
    counted = with_bar(prompts, "measure prompts", len(prompts), "prompt")
    length, longest = max((len(tokenizer(text)["input_ids"]), text) for text in counted)
    if length + max_completion_length > context:
        raise ValueError(
            f"`max_completion_length` is {max_completion_length}: with the longest prompt ({length} tokens: "
            f"{longest!r}) it exceeds the model's context of {context}. Write {context - length} or less"
        )


# Values of moves for `P:` rows that have none

AHEAD = 1024  # rows read ahead, so that every engine of the pool has something to do


def with_values(rows: Iterable[dict[str, Any]], pool: EnginePool, report: Report) -> Iterator[dict[str, Any]]:
    """The rows in their order, `P:` rows without values valued by the engines.

    Args:
        rows: in the schema of the shipped data; a `P:` row to be valued has no `legal_moves`. Its `target` may be empty
            (it becomes the gold completion) or a completion, whose `B:` becomes the best of its moves.
        pool: running.
        report: filled on the way.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, AHEAD)):
        bare = [row for row in chunk if row["task"] == "policy" and not row["legal_moves"]]
        fens = [policy.parse_prompt(row["prompt"]) for row in bare]
        failed = set()
        for row, fen, values in zip(bare, fens, pool.values(fens), strict=True):
            if values is None or len(values) != chess.Board(fen).legal_moves.count():
                failed.add(id(row))
                report.count("P: rows left out because a search failed")
                continue
            by_move = {value.move: value.centipawns for value in sorted(values, key=lambda value: value.move)}
            row |= {"legal_moves": list(by_move), "legal_cp": list(by_move.values())}
            target = _target(row["target"], by_move, fen)
            if row["target"] and target != row["target"]:
                report.count("P: rows whose 'B:' a better move of their list replaced")
            report.count("P: rows valued by an engine")
            row["target"] = target
        yield from (row for row in chunk if id(row) not in failed)


def _target(written: str, values: dict[str, int], fen: str) -> str:
    if not written:
        return policy.policy_completion(list(values), list(values.values()), random.Random(fen))
    output = policy.parse(written.rstrip())
    best = max(output.moves, key=values.__getitem__)  # the first of equals, as the row has them
    if output.best in output.moves and values[output.best] == values[best]:
        return written
    return policy.with_best(written, best)
