"""Builds the shipped data set from generated positions: stratified, deduplicated, split by game, every move valued."""

import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq

from recipes.making.generation import read_lines, write_parquet
from recipes.making.transitions import EnvironmentRows
from rookworld_trl.chess import position_key
from rookworld_trl.chess.dataset import (
    HELD_OUT_ANSWERS,
    SPLITS,
    SplitName,
    held_out_answers,
    in_turn,
    position_number,
    positions_of_record,
    split_by_hash,
    split_of,
)
from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.policy import win_chance
from rookworld_trl.chess.strata import phase
from rookworld_trl.settings.parser import option

# What is on disk. Prompts, answers and legal moves follow from it by python-chess.
COMPACT_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("fen", pa.string()),
        ("move", pa.string()),  # A: only
        ("history", pa.string()),  # A: only; the moves before, oldest first
        ("cp", pa.list_(pa.int16())),  # P: only; of each legal move, in UCI order; mates +-(10000 - moves to mate)
        ("stratum", pa.string()),
        ("game", pa.string()),  # what the position was taken from; empty: from nothing that gave another row
    ]
)

# Rows of each phase, half of them with White to move, and of human openings.
POLICY_ROWS: dict[SplitName, dict[str, int]] = {
    "train": {"human_opening": 1_000, "opening": 1_800, "middlegame": 5_200, "endgame": 4_000},
    "dev": {"human_opening": 200, "opening": 300, "middlegame": 840, "endgame": 660},
    "test": {"human_opening": 300, "opening": 450, "middlegame": 1_260, "endgame": 990},
}
POOL: dict[SplitName, int] = {"train": 40_000, "dev": 25_000, "test": 40_000}  # positions looked at
CHUNK = 50  # positions that an engine values in a row

# Share of `P:` rows of a stratum in which nothing is at stake: all moves within a point of win chance. To have
# enough others, more positions of dev and test are valued than are kept.
EVEN_SHARE, EVEN = 0.1, 0.01
CANDIDATES: dict[SplitName, float] = {"train": 1.1, "dev": 1.8, "test": 1.8}


def candidates(split: SplitName) -> dict[str, int]:
    """How many positions of each stratum are valued."""
    return {name: round(number * CANDIDATES[split]) for name, number in POLICY_ROWS[split].items()}


@dataclass(frozen=True)
class Sources:
    """What a data set is built from: folders that `positions` wrote, and a TSV of opening lines, if any."""

    positions: Path = field(metadata={"help": "Folder that `positions` wrote."})
    held_out: Path = field(metadata={"help": "Folder that `positions --held_out` wrote."})
    openings: str | None = option(None, "TSV of opening lines (lichess-org/chess-openings); default: no such rows.")


def game_names(folder: Path, held_out: bool) -> str:
    """What the names of a folder's games begin with: the seed they were made from.

    Raises:
        ValueError: the folder holds no positions, or games that were (or were not) made to be held out.
    """
    stamp = folder / "settings.json"
    if not stamp.exists() or not any(folder.glob("positions-*.parquet")):
        raise ValueError(f"{folder} holds no positions-*.parquet with a settings.json; make them first")
    settings = json.loads(stamp.read_text())
    if settings.get("held_out", False) != held_out:
        wanted = "with --held_out" if held_out else "without --held_out"
        raise ValueError(f"{folder}: its games are not what dev and test or train need; make them {wanted}")
    return f"{settings['seed']}:"


def read_pool(sources: Sources, seed: int) -> dict[SplitName, list[dict[str, Any]]]:
    """Distinct positions of each split, `game` with each, at first one of every game, then a second one, and so on.

    Raises:
        ValueError: see `game_names`; or both folders were made from the same seed.
    """
    folders = [(sources.positions, False), (sources.held_out, True)]
    names = [game_names(folder, held_out) for folder, held_out in folders]
    if names[0] == names[1]:
        raise ValueError(f"{sources.held_out}: its games have the seed of {sources.positions}; give another --seed")
    found: dict[SplitName, dict[str, dict[str, Any]]] = {split: {} for split in SPLITS}
    for (folder, held_out), name in zip(folders, names, strict=True):
        for shard in sorted(folder.glob("positions-*.parquet")):
            for record in pq.read_table(shard, columns=["fen", "history", "game"]).to_pylist():
                split = split_by_hash(record["fen"]) if held_out else split_of(record["fen"])
                if held_out == (split != "train"):
                    record["game"] = f"{name}{record['game']}"
                    found[split].setdefault(position_key(record["fen"]), record)
    return {
        split: shuffled(list(records.values()), random.Random(f"{seed}:{split}"))[: POOL[split]]
        for split, records in found.items()
    }


def shuffled(records: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The records in random order, the first one of each game before the second one of any."""
    rng.shuffle(records)
    return in_turn(records, itemgetter("game"))


def read_human_openings(path: str | None, seed: int) -> dict[SplitName, list[dict[str, Any]]]:
    """Positions of human opening lines, by the split of their hash; lines that begin alike count as one game."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_lines(path) if path else []:
        board = chess.Board()
        for ply, move in enumerate(line):
            board.push_uci(move)
            game = f"opening:{' '.join(line[:3])}"
            record = {"fen": board.fen(), "history": " ".join(line[max(0, ply - 8) : ply + 1]), "game": game}
            if any(board.legal_moves):
                found.setdefault(position_key(board.fen()), record)
    split: dict[SplitName, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for record in found.values():
        own = split_by_hash(record["fen"])
        if own != "train" or split_of(record["fen"]) == "train":
            split[own].append(record)
    return {name: shuffled(records, random.Random(f"{seed}:{name}:openings")) for name, records in split.items()}


def choose_policy_rows(
    records: Iterable[dict[str, Any]],
    openings: Iterable[dict[str, Any]],
    wanted: dict[str, int],
    taken: Collection[str],
) -> list[dict[str, Any]]:
    """The first positions of each stratum that fill its number, White and Black to move alike where there are enough.

    Human openings that are missing are made up for by middlegames.
    """
    chosen: dict[str, dict[str, Any]] = {}

    def choose(record: dict[str, Any], stratum: str) -> None:
        row = {"task": "policy", "move": "", "history": "", "stratum": stratum}
        chosen[position_key(record["fen"])] = row | {"fen": record["fen"], "game": record["game"]}

    for record in openings:
        if len(chosen) < wanted["human_opening"] and position_key(record["fen"]) not in taken:
            choose(record, "human_opening")
    missing = wanted["human_opening"] - len(chosen)
    left = {
        (name, turn): (number + (missing if name == "middlegame" else 0) + turn) // 2
        for name, number in wanted.items()
        for turn in chess.COLORS
    }
    for record in records:
        board, key = chess.Board(record["fen"]), position_key(record["fen"])
        kind = phase(board)
        if left[kind, board.turn] and key not in taken and key not in chosen:
            left[kind, board.turn] -= 1
            choose(record, kind)
    return list(chosen.values())


def keep_policy_rows(rows: Sequence[dict[str, Any]], wanted: dict[str, int]) -> list[dict[str, Any]]:
    """The first valued rows of each stratum, as many as wanted, few of them with nothing at stake."""
    left = dict(wanted)
    even = {name: int(EVEN_SHARE * number) for name, number in wanted.items()}
    left["middlegame"] += max(0, left["human_opening"] - sum(row["stratum"] == "human_opening" for row in rows))
    kept = []
    for row in (row for row in rows if row["cp"]):
        chances = [win_chance(cp) for cp in row["cp"]]
        nothing, name = max(chances) - min(chances) <= EVEN, row["stratum"]
        if left[name] and (not nothing or even[name]):
            left[name] -= 1
            even[name] -= nothing
            kept.append(row)
    return kept


def choose_rows(sources: Sources, seed: int) -> dict[SplitName, list[dict[str, Any]]]:
    """The rows of each split, without values, with more `P:` rows than are kept.

    A later split leaves out what an earlier one shows.

    Test comes first, then dev. No answer of theirs is a position of the training folder.
    """
    pool, openings = read_pool(sources, seed), read_human_openings(sources.openings, seed)
    trained = {
        position_number(fen)
        for shard in sorted(sources.positions.glob("positions-*.parquet"))
        for fen in pq.read_table(shard, columns=["fen"])["fen"].to_pylist()
    }
    taken: set[str] = set()
    rows: dict[SplitName, list[dict[str, Any]]] = {}
    for split in ("test", "dev", "train"):
        rng = random.Random(f"{seed}:{split}:rows")
        first, human = openings[split][::5], [each for i, each in enumerate(openings[split]) if i % 5]
        policy_rows = choose_policy_rows(pool[split], human, candidates(split), taken)
        used = {position_key(row["fen"]) for row in policy_rows}
        left = [record for record in pool[split] if position_key(record["fen"]) not in used]
        builder = EnvironmentRows(split, rng, taken | used, trained if split != "train" else frozenset())
        rows[split] = policy_rows + builder.choose(left, first)
        for row in rows[split]:
            taken.update(positions_of_record(row))
    return rows


def write_held_out(folder: Path, shown: Mapping[SplitName, Iterable[str]]) -> None:
    """Write the list of `dataset.held_out_answers` with those of the positions (`position_key`) that dev and test show
    added whose own hash says train."""
    listed = dict(held_out_answers())
    for split, keys in shown.items():
        fens = (f"{key} 0 1" for key in keys)
        listed |= {position_number(fen): split for fen in fens if split_by_hash(fen) == "train"}
    order = sorted(listed)
    table = pa.table({"position": pa.array(order, pa.uint64()), "split": [listed[number] for number in order]})
    write_parquet(table, folder / HELD_OUT_ANSWERS.name)


def value_every_move(fens: list[str], nodes: int) -> list[list[int] | None]:
    """Engine values of all legal moves of each position, in UCI order; None where the engine failed."""
    values: list[list[int] | None] = []
    with Engine(nodes=nodes, hash_mb=16, timeout=60.0) as engine:
        for fen in fens:
            found = engine.analyse(chess.Board(fen), multipv=500, game=fen)
            values.append([value.centipawns for value in sorted(found, key=lambda v: v.move)] if found else None)
    return values


def value_rows(rows: Sequence[dict[str, Any]], nodes: int, memory: Path, workers: int) -> Iterator[int]:
    """Write the `cp` of the rows' moves; what was valued before is read from `memory`, a JSON Lines file."""
    known: dict[str, list[int] | None] = {}
    if memory.exists():
        for line in memory.read_text().splitlines():
            entry = json.loads(line)
            if entry["nodes"] == nodes:
                known[entry["fen"]] = entry["cp"]
    todo = [row["fen"] for row in rows if row["fen"] not in known]
    yield len(rows) - len(todo)
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    with ProcessPoolExecutor(max_workers=workers) as executor, memory.open("a") as file:
        jobs = [executor.submit(value_every_move, chunk, nodes) for chunk in chunks]
        for chunk, job in zip(chunks, jobs, strict=True):
            for fen, values in zip(chunk, job.result(), strict=True):
                known[fen] = values
                file.write(json.dumps({"nodes": nodes, "fen": fen, "cp": values}) + "\n")
            file.flush()
            yield len(chunk)
    for row in rows:
        row["cp"] = known[row["fen"]]


def build_shipped(
    sources: Sources,
    output: Path,
    seed: int,
    nodes: dict[SplitName, int],
    workers: int,
) -> Iterator[int]:
    """Write `train`, `dev` and `test` Parquet files and the list of held-out answers.

    Run again, it goes on where it was interrupted. Yields the number of positions valued since the last yield.
    """
    rows = choose_rows(sources, seed)
    output.mkdir(parents=True, exist_ok=True)
    write_held_out(
        output, {split: chain.from_iterable(map(positions_of_record, rows[split])) for split in ("dev", "test")}
    )
    for split in ("test", "dev", "train"):
        policy_rows = [row for row in rows[split] if row["task"] == "policy"]
        yield from value_rows(policy_rows, nodes[split], output / "values.jsonl", workers)
        done = keep_policy_rows(policy_rows, POLICY_ROWS[split])
        done += [row | {"cp": []} for row in rows[split] if row["task"] == "environment"]
        random.Random(f"{seed}:{split}:order").shuffle(done)
        write_parquet(pa.Table.from_pylist(done, schema=COMPACT_SCHEMA), output / f"{split}.parquet")


def counts(directory: Path) -> dict[str, Counter[str]]:
    """Rows per split and stratum of a built data set, for its card."""
    return {
        split: Counter(
            f"{row['task']}/{row['stratum']}" for row in pq.read_table(directory / f"{split}.parquet").to_pylist()
        )
        for split in SPLITS
    }
