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

ROWS_VERSION = 5  # of what `supervised_rows` makes of the same positions; part of the hash of cached rows
LISTING_PREFIX = "L: "
CHECK_REPEATS = 2  # how often more a `P:` row in check is given, where `check_share` asks for such rows
ILLEGAL_SHARE, RARE_SHARE = 0.25, 0.3  # of the moves of `A:` rows; the others are the one played or any legal one

# Half of the `A:` rows show all the moves before that are known, up to nine; the others any number of them, so that a
# model does not learn to lean on a full history. Some show a position of no game with other clocks, where the fifty-
# and the seventy-five-move rule are near.
WHOLE_HISTORY_SHARE = 0.5
CLOCK_SHARE = 0.06


def policy_completion(moves: list[str], centipawns: list[int], rng: random.Random) -> str:
    """The gold `P:` completion from moves and their values: the five best in random order, as RookWorld's rows have
    them, so that neither a place in the list nor the alphabet tells the best one. Of equals the first listed is `B:`.
    """
    ranked = sorted(zip(moves, centipawns, strict=True), key=lambda pair: -pair[1])[: policy.MAX_CANDIDATES]
    rng.shuffle(ranked)
    best = max(ranked, key=lambda pair: pair[1])[0]
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


def choose_move(record: dict[str, Any], rng: random.Random) -> str:
    """The move of an `A:` row: the one played, a random legal one, a rare one, or an illegal one."""
    board = chess.Board(record["fen"])
    draw = rng.random()
    if draw < ILLEGAL_SHARE:
        return illegal_move(board, rng)
    if draw < ILLEGAL_SHARE + RARE_SHARE:
        return rare_move(board, rng)
    if draw < ILLEGAL_SHARE + RARE_SHARE + (1 - ILLEGAL_SHARE - RARE_SHARE) / 2:
        return rng.choice([legal.uci() for legal in board.legal_moves])
    return str(record["played"])


def cut_history(history: list[str], rng: random.Random) -> list[str]:
    """The moves before a position, or the last few of them, of each number alike."""
    if rng.random() < WHOLE_HISTORY_SHARE:
        return history
    return history[len(history) - rng.randint(0, len(history)) :]


def with_clocks(fen: str, rng: random.Random) -> str | None:
    """The position late in a game without captures and pawn moves; None where the last move was a double step."""
    *fields, en_passant, _, number = fen.split()
    if en_passant != "-":
        return None
    clock = rng.choice((149, 149, rng.randint(140, 149), rng.randint(97, 101), rng.randint(0, 149)))
    return " ".join((*fields, "-", str(clock), str(max(int(number), clock // 2 + rng.randint(1, 60)))))


def environment_row(record: dict[str, Any], move: str) -> dict[str, str]:
    """An `A:` row, with the FEN after the move beside it."""
    output = environment.transition(record["fen"], move)
    return {
        "task": "environment",
        "prompt": environment.prompt(record["fen"], move, record["history"].split()),
        "completion": environment.format_completion(output),
        "after": output.fen,
    }


def environment_rows(record: dict[str, Any], number: int, scarce: bool, rng: random.Random) -> list[dict[str, str]]:
    """`A:` rows of one position, no move twice: so many, and one of a scarce kind of move if asked for and offered."""
    moves = dict.fromkeys(choose_move(record, rng) for _ in range(number))
    if scarce and (move := scarce_move(chess.Board(record["fen"]), rng)):
        moves.setdefault(move)
    rows = []
    for move in moves:
        late = with_clocks(record["fen"], rng) if rng.random() < CLOCK_SHARE else None
        history = "" if late else " ".join(cut_history(record["history"].split(), rng))
        rows.append(environment_row(record | {"fen": late or record["fen"], "history": history}, move))
    return rows


def supervised_rows(
    shards: Iterable[Path],
    seed: int,
    environment_share: float,
    listing_share: float = 0.0,
    scarce_share: float = 0.0,
    check_share: float = 0.0,
) -> Iterator[dict[str, str]]:
    """Train-split rows, in the order of the shards; all rows of a position follow each other.

    Columns: `task` (`policy`, `environment` or `listing`), `prompt`, `completion`, and `position`, a name that the
    rows of one record share and no others: prompts of its `A:` rows begin alike.

    A position met before in the same shard is skipped (openings repeat). Every position gives a `P:` row,
    `environment_share` `A:` rows in the mean (2.5: two or three, of different moves) and, with probability
    `listing_share`, an `L:` row. With `scarce_share` one that offers a mate, a promotion or another scarce kind of
    move gives one more `A:` row, of that move. With `check_share` a position in check, or one that a check can lead
    to, gives one more `L:` row, and a `P:` row in check comes three times. A row whose next position belongs to dev
    or test is dropped: no held-out position is seen in training, not even as an answer.
    """
    for shard in shards:
        rng = random.Random(f"{seed}:{shard.name}")
        seen: set[str] = set()
        for record in pq.read_table(shard).to_pylist():
            key = position_key(record["fen"])
            if key in seen or split_of(record["fen"]) != "train":
                continue
            seen.add(key)
            name = f"{shard.name}:{len(seen)}"
            row = {
                "task": "policy",
                "prompt": policy.prompt(record["fen"]),
                "completion": policy_completion(record["moves"], record["cp"], rng),
                "position": name,
            }
            yield row
            whole, rest = divmod(environment_share, 1)
            number = int(whole) + (rng.random() < rest)
            others = environment_rows(record, number, rng.random() < scarce_share, rng)
            if rng.random() < listing_share:
                others.append(listing_row(nearby(record, rng)))
            if check_share and rng.random() < check_share:
                board = in_check(record, rng)
                others += [] if board is None else [listing_row(board)]
                if chess.Board(record["fen"]).is_check():
                    yield from [row] * CHECK_REPEATS
            yield from (other | {"position": name} for other in others if split_of(other.pop("after")) == "train")
