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

ROWS_VERSION = 3  # of what `supervised_rows` makes of the same positions; part of the hash of cached rows
LISTING_PREFIX = "L: "


def policy_completion(moves: list[str], centipawns: list[int]) -> str:
    """The gold `P:` completion from moves and their values: of the five best, the best first, the others in UCI order.

    The order is one that a small model can follow. In order of value, what comes next hardly depends on what was
    written before, and the likeliest completion is one move five times; after the best move, each of these is past
    the one before it.
    """
    ranked = sorted(zip(moves, centipawns, strict=True), key=lambda pair: -pair[1])[: policy.MAX_CANDIDATES]
    ranked[1:] = sorted(ranked[1:])
    candidates = [move for move, _ in ranked]
    return policy.format_completion(candidates, [policy.format_eval(cp) for _, cp in ranked], candidates[0])


def listing_row(record: dict[str, Any], rng: random.Random) -> dict[str, str]:
    """An `L:` row: all legal moves in UCI order, of the position or of the one after a random move.

    Only supervised training has these. A `P:` row says of five moves that they are legal and leaves open which of the
    others are; here each of some thirty moves has one right answer, and legality is learned from far fewer positions.
    """
    board = chess.Board(record["fen"])
    if rng.random() < 0.5:
        board.push(rng.choice(list(board.legal_moves)))
    moves = sorted(move.uci() for move in board.legal_moves)
    return {
        "task": "listing",
        "prompt": f"{LISTING_PREFIX}{board.fen()}",
        "completion": f" M: {' '.join(moves)}" if moves else " M:",
        "after": board.fen(),
    }


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
    illegal_share: float = 0.12,
    rare_share: float = 0.35,
) -> Iterator[dict[str, str]]:
    """Train-split rows with the columns `task`, `prompt` and `completion`, in the order of the shards.

    A position met before in the same shard is skipped (openings repeat). Every position gives a `P:` row and, with
    probability `environment_share`, an `A:` row and, with `listing_share`, an `L:` row; with `scarce_share` one that
    offers a mate, a promotion or another scarce kind of move gives one more `A:` row, of that move. A row whose next
    position belongs to dev or test is dropped: no held-out position is seen in training, not even as an answer.
    """
    for shard in shards:
        rng = random.Random(f"{seed}:{shard.name}")
        seen: set[str] = set()
        for record in pq.read_table(shard).to_pylist():
            key = position_key(record["fen"])
            if key in seen or split_of(record["fen"]) != "train":
                continue
            seen.add(key)
            yield {
                "task": "policy",
                "prompt": policy.prompt(record["fen"]),
                "completion": policy_completion(record["moves"], record["cp"]),
            }
            others = []
            if rng.random() < environment_share:
                others.append(environment_row(record, choose_move(record, rng, illegal_share, rare_share)))
            if rng.random() < listing_share:
                others.append(listing_row(record, rng))
            if scarce_share and rng.random() < scarce_share:
                move = scarce_move(chess.Board(record["fen"]), rng)
                others += [] if move is None else [environment_row(record, move)]
            yield from (row for row in others if split_of(row.pop("after")) == "train")
