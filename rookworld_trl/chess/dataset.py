"""The shipped data set for GRPO and evaluation, compact on disk, whole rows in memory, and splits of any data.

The split of a position is a hash of the position alone, so that none is in two of them. A move of a held-out `A:` row
may lead to a position whose hash says train. Such positions of the shipped dev and test rows, and of those of earlier
versions, are listed in a file, and so are the mates in one and the tactics: they are held out as well.
"""

import functools
import gzip
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import chess
import pyarrow.parquet as pq
from datasets import Dataset

from rookworld_trl.chess import ParseError, environment, policy, position_key, task_of
from rookworld_trl.settings.terminal import with_bar

T = TypeVar("T")
SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")
HELD_OUT_PERMILLE = 40  # of dev and of test

SHIPPED_DIRECTORY = Path(str(files("rookworld_trl"))) / "assets" / "data"
HELD_OUT_ANSWERS = SHIPPED_DIRECTORY / "held_out_answers.parquet"
# Positions to be solved, which recipes/generate_data.py found; no training source shows them.
MATES_FILE = SHIPPED_DIRECTORY / "mate_in_one.epd.gz"
TACTICS_FILES: dict[SplitName, Path] = {
    "dev": SHIPPED_DIRECTORY / "tactics_dev.epd.gz",
    "test": SHIPPED_DIRECTORY / "tactics_test.epd.gz",
}
PROBLEM_FILES = (MATES_FILE, *TACTICS_FILES.values())


def row_of(
    task: str,
    prompt: str,
    target: str,
    stratum: str,
    legal_moves: Sequence[str] = (),
    legal_cp: Sequence[int] = (),
    game: str = "",
) -> dict[str, Any]:
    """A row with the columns that `load_shipped` tells of."""
    row = {"prompt": prompt, "task": task, "target": target, "stratum": stratum, "game": game}
    return row | {"legal_moves": list(legal_moves), "legal_cp": list(legal_cp)}


@dataclass
class Report:
    """What became of the rows of a source: how often, by what happened, and the first example of some of it."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def count(self, what: str, example: str = "") -> None:
        self.counts[what] += 1
        if example:
            self.examples.setdefault(what, example)

    def __str__(self) -> str:
        first = {what: f" (first: {example})" for what, example in self.examples.items()}
        return "\n".join(f"{count} {what}{first.get(what, '')}" for what, count in self.counts.items())


def expand(record: Mapping[str, Any]) -> dict[str, Any]:
    """A compact record as a row with `prompt`, `task`, `target`, `legal_moves`, `legal_cp`, `stratum` and `game`.

    Raises:
        ValueError: a `P:` record does not hold one value for each legal move.
    """
    task, stratum, game = record["task"], record["stratum"], record.get("game") or ""
    if task == "environment":
        output = environment.transition(record["fen"], record["move"])
        prompt = environment.prompt(record["fen"], record["move"], record["history"].split())
        return row_of(task, prompt, environment.format_completion(output), stratum, game=game)
    moves = sorted(move.uci() for move in chess.Board(record["fen"]).legal_moves)
    values = record["cp"]
    if len(values) != len(moves):
        raise ValueError(f"field 'cp' of {record['fen']}: {len(values)} values for {len(moves)} legal moves")
    target = policy.policy_completion(moves, values, random.Random(record["fen"]))
    return row_of(task, policy.prompt(record["fen"]), target, stratum, moves, values, game)


def load_shipped(split: str, directory: Path = SHIPPED_DIRECTORY) -> Dataset:
    """The shipped rows of `train`, `dev` or `test`, both tasks, in the shipped (shuffled) order.

    Columns: `prompt`, `task` (`policy` or `environment`), `target` (gold completion), `legal_moves` and `legal_cp`
    (`P:` rows: every legal move in UCI order and its engine value in centipawns from the mover's side; `A:` rows:
    empty), `stratum`, `game` (what the position was taken from, or empty: intervals go by game).

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split '{split}' does not exist; choose one of {', '.join(SPLITS)}")
    records = pq.read_table(directory / f"{split}.parquet").to_pylist()
    return Dataset.from_list([expand(each) for each in with_bar(records, f"read {split}", len(records), "row")])


def positions_of_record(record: Mapping[str, Any]) -> list[str]:
    """The positions of a compact record, by `position_key`: its own and, for `A:`, the one that its move leads to."""
    fens = [record["fen"]]
    if record["task"] == "environment":
        fens.append(environment.transition(record["fen"], record["move"]).fen)
    return [position_key(fen) for fen in fens]


def shipped_positions(split: str, directory: Path = SHIPPED_DIRECTORY) -> set[str]:
    """All positions that a shipped split shows, in prompts and in answers, by `position_key`."""
    records = pq.read_table(directory / f"{split}.parquet", columns=["task", "fen", "move"]).to_pylist()
    return {position for record in records for position in positions_of_record(record)}


def held_out_positions() -> set[str]:
    """All positions, by `position_key`, that the shipped data measures on: dev and test, in prompts and in answers,
    mates in one and tactics."""
    found = shipped_positions("dev") | shipped_positions("test")
    for file in PROBLEM_FILES:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            found |= {position_key(chess.Board.from_epd(line)[0].fen()) for line in lines}
    return found


# Splits


def position_number(fen: str) -> int:
    """64 bits of a hash of the position, clocks left out: what its split is drawn by."""
    digest = hashlib.blake2b(position_key(fen).encode(), digest_size=8, person=b"rookworld-split").digest()
    return int.from_bytes(digest, "big")


def split_by_hash(fen: str) -> SplitName:
    """The split of a position by its hash alone: 4 % test, 4 % dev, the rest train."""
    permille = position_number(fen) % 1000
    if permille < HELD_OUT_PERMILLE:
        return "test"
    return "dev" if permille < 2 * HELD_OUT_PERMILLE else "train"


def split_of(fen: str) -> SplitName:
    """The split of a position (clocks don't count): dev or test if it is listed as a held-out answer, else by hash."""
    return held_out_answers().get(position_number(fen)) or split_by_hash(fen)


@functools.cache
def held_out_answers() -> dict[int, SplitName]:
    """By `position_number`: positions of held-out answers and of problems whose hash says another split."""
    table = pq.read_table(HELD_OUT_ANSWERS)
    return dict(zip(table["position"].to_pylist(), table["split"].to_pylist(), strict=True))


def positions_of(prompt: str, target: str | None = None) -> list[str]:
    """The positions that a row shows, by `position_key`: the prompt's and, for `A:`, the one its target leads to."""
    if task_of(prompt) == "policy":
        return [position_key(policy.parse_prompt(prompt))]
    shown = [position_key(environment.parse_prompt(prompt).fen)]
    try:
        after = environment.parse(target or "").fen
    except ParseError:  # a target of another spelling: nothing to compare
        return shown
    return [*shown, position_key(after)]


def positions_in(dataset: Dataset) -> set[str]:
    """All positions that rows with `prompt` and `target` show, see `positions_of`."""
    rows = zip(dataset["prompt"], dataset["target"], strict=True)
    return {position for prompt, target in rows for position in positions_of(prompt, target)}


def draw_of_each(dataset: Dataset, limits: Mapping[str, int | None]) -> Dataset:
    """Rows of each task drawn at random, as many as `limits` says (None: all), in the data set's order.

    Of each game one row is drawn before a second one of any: intervals go by game, and the more games the narrower.
    Rows of no game stand for themselves. The draw is the same in every run, so that its results can be paired.
    """
    rng = random.Random(0)
    tasks = list(dataset["task"])
    games = list(dataset["game"]) if "game" in dataset.column_names else [""] * len(dataset)
    chosen = []
    for task, limit in limits.items():
        rows = [number for number, name in enumerate(tasks) if name == task]
        rng.shuffle(rows)
        chosen += in_turn(rows, games.__getitem__)[:limit]
    return dataset.select(sorted(chosen))


def in_turn(items: Iterable[T], game_of: Callable[[T], str]) -> list[T]:
    """The items in their order, but one of each game before the second one of any; where it is "", each is its own."""
    turns: Counter[str] = Counter()
    numbered = []
    for item in items:
        game = game_of(item)
        numbered.append((turns[game] if game else 0, item))
        turns[game] += 1
    return [item for _, item in sorted(numbered, key=lambda pair: pair[0])]
