"""Positions with engine values, from openings and noisy engine self-play. Deterministic from a seed, game by game."""

import csv
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq

from rookworld_trl.chess.dataset import SplitName, split_by_hash
from rookworld_trl.chess.engine import Engine, MoveValue
from rookworld_trl.chess.format import HISTORY_LENGTH
from rookworld_trl.chess.policy import win_chance
from rookworld_trl.settings.parser import check_options, option

# Noise of a player: softmax temperature over win chances, and the share of moves played at random. Drawn for each side
# of a game, so that the corpus holds sound games, sloppy ones, wild ones (promotions, lone kings, mates, stalemates),
# one side punishing the other, and positions as a model that has learned nothing yet makes them.
TEMPERATURES = (0.01, 0.03, 0.1)
RANDOM_SHARES = (0.0, 0.05, 0.15, 0.4, 1.0)

# At this share of a held-out game's plies, moves that were not played are looked at, too.
DEVIATIONS_SHARE = 0.3
TEST_GAMES = 0.6  # of the held-out games; the others are dev's

POSITION_SCHEMA = pa.schema(
    [
        ("fen", pa.string()),
        ("history", pa.string()),  # the moves before, at most HISTORY_LENGTH - 1, oldest first
        ("moves", pa.list_(pa.string())),  # best first
        ("cp", pa.list_(pa.int16())),  # of `moves`, mover's view; mates +-(10000 - moves to mate)
        ("played", pa.string()),
        ("game", pa.int32()),
    ]
)


@dataclass(frozen=True)
class GameSettings:
    """What decides a game besides its number. Written beside the shards; a resumed run must match it."""

    seed: int = option(0, "Of the games, one by one.")
    nodes: int = option(1000, "Engine nodes a position, of all its moves together.", least=1)
    multipv: int = option(5, "Moves of a position that are valued.", least=1)
    max_plies: int = option(180, "Half-moves of a game, at most.", least=1)
    games_per_shard: int = option(20, "Games of each file.", least=1)
    openings: str | None = option(None, "TSV of opening lines (lichess-org/chess-openings); default: random ones.")
    check_share: float = option(0.0, "Share of the moves that could give check which do.", least=0, most=1)
    held_out: bool = option(False, "Games of dev and test alone: only their positions are written, without values.")

    def __post_init__(self) -> None:
        check_options(self)


def read_lines(path: str | Path) -> list[tuple[str, ...]]:
    """Opening lines as UCI moves from a TSV with a `pgn` column (the lichess-org/chess-openings format).

    Raises:
        ValueError: naming the file and the line that does not hold a legal line.
    """
    lines = []
    with open(path, newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        if "pgn" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column 'pgn'; give a TSV with the columns eco, name, pgn")
        for number, row in enumerate(reader, start=2):
            board, moves = chess.Board(), []
            for word in row["pgn"].split():
                if word.endswith("."):
                    continue
                try:
                    moves.append(board.push_san(word).uci())
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}, field 'pgn': {error}") from error
            lines.append(tuple(moves))
    return lines


def random_endgame(rng: random.Random) -> chess.Board:
    """A legal position of two kings and one to seven other men, pawns likelier than pieces."""
    while True:
        board = chess.Board(None)
        men = [chess.Piece(chess.KING, chess.WHITE), chess.Piece(chess.KING, chess.BLACK)]
        for _ in range(rng.randint(1, 7)):
            kind = rng.choice("PPPPNBRRQ")
            men.append(chess.Piece.from_symbol(kind if rng.random() < 0.5 else kind.lower()))
        for square, man in zip(rng.sample(chess.SQUARES, len(men)), men, strict=True):
            board.set_piece_at(square, man)
        board.turn = rng.random() < 0.5
        board.fullmove_number = rng.randint(30, 90)
        board.halfmove_clock = rng.choice((0, 0, rng.randint(1, 40), rng.randint(40, 99)))
        if board.is_valid() and not board.is_game_over():
            return board


def opening_position(rng: random.Random, openings: Sequence[tuple[str, ...]]) -> chess.Board:
    """Where a game starts: a human opening line cut anywhere, random moves, both, or (one in eight) an endgame."""
    if rng.random() < 0.125:
        return random_endgame(rng)
    board = chess.Board()
    if openings and rng.random() < 0.8:
        line = rng.choice(openings)
        for uci in line[: rng.randint(1, len(line))]:
            board.push_uci(uci)
    for _ in range(rng.choice((0, 0, 2, 4, 8)) if board.move_stack else rng.randint(0, 12)):
        moves = list(board.legal_moves)
        if not moves or board.is_game_over():
            break
        board.push(rng.choice(moves))
    return board


def play_game(
    engine: Engine, index: int, settings: GameSettings, openings: Sequence[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    """Play one game of two noisy players and yield a record for each position (columns of POSITION_SCHEMA).

    The moves of the opening are shown from a random one on, so that first moves of games occur.
    """
    rng = random.Random(f"{settings.seed}:{index}")
    start = opening_position(rng, openings)
    board, opening = start.root(), [move.uci() for move in start.move_stack]
    shown = rng.randint(0, len(opening))
    noise = {side: (rng.choice(TEMPERATURES), rng.choice(RANDOM_SHARES)) for side in chess.COLORS}
    split: SplitName = "test" if rng.random() < TEST_GAMES else "dev"
    for ply in range(settings.max_plies):
        if board.is_game_over() or board.is_repetition(3):
            return
        if ply < shown:
            board.push_uci(opening[ply])
            continue
        temperature, random_share = noise[board.turn]
        known = ply < len(opening)
        values: list[MoveValue] = []
        if not settings.held_out or not (known or random_share == 1.0):
            values = engine.analyse(board, multipv=settings.multipv, game=index) or []
            if not values:
                return
        played = opening[ply] if known else choose_move(board, values, temperature, random_share, settings, rng)
        if settings.held_out:
            yield from held_out_records(board, split, index, rng)
        else:
            yield _record(board, index, values, played)
        board.push_uci(played)


def choose_move(
    board: chess.Board,
    values: Sequence[MoveValue],
    temperature: float,
    random_share: float,
    settings: GameSettings,
    rng: random.Random,
) -> str:
    """The move of a player: one that gives check, a random one, or one of those with values, better ones likelier."""
    if settings.check_share and rng.random() < settings.check_share:
        checks = [move.uci() for move in board.legal_moves if board.gives_check(move)]
        if checks:
            return rng.choice(checks)
    if rng.random() < random_share:
        return rng.choice([move.uci() for move in board.legal_moves])
    best = win_chance(values[0].centipawns)
    weights = [math.exp((win_chance(value.centipawns) - best) / temperature) for value in values]
    return rng.choices([value.move for value in values], weights)[0]


def held_out_records(board: chess.Board, split: SplitName, game: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The position, and at some plies those after each legal move, as far as their hash says `split`.

    They have no values and no move played. Since no position of the training split is among them, a folder of held-out
    games gives no rows to a training that reads it by mistake.
    """
    if split_by_hash(board.fen()) == split:
        yield _record(board, game, (), "")
    if rng.random() < DEVIATIONS_SHARE:
        for move in list(board.legal_moves):
            board.push(move)
            if split_by_hash(board.fen()) == split and any(board.legal_moves):
                yield _record(board, game, (), "")
            board.pop()


def _record(board: chess.Board, game: int, values: Sequence[MoveValue], played: str) -> dict[str, Any]:
    return {
        "fen": board.fen(),
        "history": " ".join(move.uci() for move in board.move_stack[-(HISTORY_LENGTH - 1) :]),
        "moves": [value.move for value in values],
        "cp": [value.centipawns for value in values],
        "played": played,
        "game": game,
    }


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a Parquet file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd", compression_level=12)
    os.replace(partial, path)


def write_shard(shard: int, directory: Path, settings: GameSettings) -> int:
    """Play the games of one shard and write it; returns the number of positions."""
    openings = read_lines(settings.openings) if settings.openings else []
    records: list[dict[str, Any]] = []
    with Engine(nodes=settings.nodes) as engine:
        first = shard * settings.games_per_shard
        for index in range(first, first + settings.games_per_shard):
            records.extend(play_game(engine, index, settings, openings))
    write_parquet(pa.Table.from_pylist(records, schema=POSITION_SCHEMA), shard_path(directory, shard))
    return len(records)


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"positions-{shard:05d}.parquet"


def missing_shards(directory: Path, shards: range, settings: GameSettings) -> list[int]:
    """The shards still to be written; makes the directory and its `settings.json`.

    Raises:
        ValueError: the directory holds shards that were made with other settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stamp = directory / "settings.json"
    described = asdict(settings)
    if stamp.exists() and asdict(GameSettings()) | json.loads(stamp.read_text()) != described:
        raise ValueError(f"{stamp} was made with other settings; choose another directory or the same settings")
    stamp.write_text(json.dumps(described, indent=2, sort_keys=True))
    return [shard for shard in shards if not shard_path(directory, shard).exists()]


def generate_positions(
    directory: Path, shards: range, settings: GameSettings, workers: int
) -> Iterator[tuple[int, int]]:
    """Write the missing shards in parallel and yield `(shard, positions)` as they finish; run again to resume.

    Raises:
        ValueError: the directory holds shards that were made with other settings.
    """
    missing = missing_shards(directory, shards, settings)
    with ProcessPoolExecutor(max_workers=workers) as pool:
        jobs = {pool.submit(write_shard, shard, directory, settings): shard for shard in missing}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
