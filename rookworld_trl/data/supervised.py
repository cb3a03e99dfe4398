"""Rows for supervised training, from the positions that `generation` wrote."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import chess
import pyarrow.parquet as pq

from rookworld_trl.data.splits import split_of
from rookworld_trl.data.strata import illegal_move, rare_move, scarce_move
from rookworld_trl.tasks import environment, policy, position_key

ROWS_VERSION = 4  # of what `supervised_rows` makes of the same positions; part of the hash of cached rows
LISTING_PREFIX = "L: "
CHECK_REPEATS = 2  # how often more a `P:` row in check is given, where `check_share` asks for such rows


def policy_completion(moves: list[str], centipawns: list[int], best_first: bool = False) -> str:
    """The gold `P:` completion from moves and their values: the five best in UCI order.

    The order is one that a small model can follow. In order of value, what comes next hardly depends on what was
    written before, and the likeliest completion is one move five times. With `best_first` the best comes first and the
    four others follow in UCI order; then it is the best that is repeated.
    """
    ranked = sorted(zip(moves, centipawns, strict=True), key=lambda pair: -pair[1])[: policy.MAX_CANDIDATES]
    best = ranked[0][0]
    ranked.sort(key=lambda pair: (pair[0] != best or not best_first, pair[0]))
    candidates, values = zip(*ranked, strict=True)
    return policy.format_completion(list(candidates), [policy.format_eval(cp) for cp in values], best)


def listing_row(board: chess.Board) -> dict[str, str]:
    """An `L:` row: all legal moves in UCI order.

    Only supervised training has these. A `P:` row says of five moves that they are legal and leaves open which of the
    others are; here each of some thirty moves has one right answer, and legality is learned from far fewer positions.
    """
    moves = sorted(move.uci() for move in board.legal_moves)
    return {
        "task": "listing",
        "prompt": f"{LISTING_PREFIX}{board.fen()}",
        "completion": f" M: {' '.join(moves)}" if moves else " M:",
        "after": board.fen(),
    }


def nearby(record: dict[str, Any], rng: random.Random) -> chess.Board:
    """The position or, half of the time, the one after a random move: moves of either side, sound or not."""
    board = chess.Board(record["fen"])
    if rng.random() < 0.5:
        board.push(rng.choice(list(board.legal_moves)))
    return board


def in_check(record: dict[str, Any], rng: random.Random) -> chess.Board | None:
    """The position if it is one in check, else the one after a move that gives check; None if there is no such move."""
    board = chess.Board(record["fen"])
    if not board.is_check():
        checks = [move for move in board.legal_moves if board.gives_check(move)]
        if not checks:
            return None
        board.push(rng.choice(checks))
    return board


def choose_move(record: dict[str, Any], rng: random.Random, illegal_share: float, rare_share: float) -> str:
    """The move of an `A:` row: the one played, a random legal one, a rare one, or an illegal one."""
    board = chess.Board(record["fen"])
    draw = rng.random()
    if draw < illegal_share:
        return illegal_move(board, rng)
    if draw < illegal_share + rare_share:
        return rare_move(board, rng)
    if draw < illegal_share + rare_share + (1 - illegal_share - rare_share) / 2:
        return rng.choice([legal.uci() for legal in board.legal_moves])
    return str(record["played"])


def environment_row(record: dict[str, Any], move: str) -> dict[str, str]:
    """An `A:` row, with the FEN after the move beside it."""
    output = environment.transition(record["fen"], move)
    return {
        "task": "environment",
        "prompt": environment.prompt(record["fen"], move, record["history"].split()),
        "completion": environment.format_completion(output),
        "after": output.fen,
    }


def supervised_rows(
    shards: Iterable[Path],
    seed: int,
    environment_share: float,
    listing_share: float = 0.0,
    scarce_share: float = 0.0,
    check_share: float = 0.0,
    best_first: bool = False,
    illegal_share: float = 0.12,
    rare_share: float = 0.35,
) -> Iterator[dict[str, str]]:
    """Train-split rows with the columns `task`, `prompt` and `completion`, in the order of the shards.

    A position met before in the same shard is skipped (openings repeat). Every position gives a `P:` row and, with
    probability `environment_share`, an `A:` row and, with `listing_share`, an `L:` row. With `scarce_share` one that
    offers a mate, a promotion or another scarce kind of move gives one more `A:` row, of that move. With `check_share`
    a position in check, or one that a check can lead to, gives one more `L:` row, and a `P:` row in check comes three
    times. A row whose next position belongs to dev or test is dropped: no held-out position is seen in training, not
    even as an answer.
    """
    for shard in shards:
        rng = random.Random(f"{seed}:{shard.name}")
        seen: set[str] = set()
        for record in pq.read_table(shard).to_pylist():
            key = position_key(record["fen"])
            if key in seen or split_of(record["fen"]) != "train":
                continue
            seen.add(key)
            row = {
                "task": "policy",
                "prompt": policy.prompt(record["fen"]),
                "completion": policy_completion(record["moves"], record["cp"], best_first),
            }
            yield row
            others = []
            if rng.random() < environment_share:
                others.append(environment_row(record, choose_move(record, rng, illegal_share, rare_share)))
            if rng.random() < listing_share:
                others.append(listing_row(nearby(record, rng)))
            if scarce_share and rng.random() < scarce_share:
                move = scarce_move(chess.Board(record["fen"]), rng)
                others += [] if move is None else [environment_row(record, move)]
            if check_share and rng.random() < check_share:
                board = in_check(record, rng)
                others += [] if board is None else [listing_row(board)]
                if chess.Board(record["fen"]).is_check():
                    yield from [row] * CHECK_REPEATS
            yield from (row for row in others if split_of(row.pop("after")) == "train")
