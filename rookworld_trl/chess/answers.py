"""What a row of a position says: the gold `P:` completion, and `A:` rows of moves of every kind."""

import random
from typing import Any

import chess

from rookworld_trl.chess import environment, policy
from rookworld_trl.chess.strata import illegal_move, rare_move, scarce_move

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


def respelled(row: dict[str, Any], spelling: policy.Spelling) -> dict[str, Any]:
    """A row of a data set, the answer of a `P:` row in another spelling: the same moves with the evals of their values.

    An answer that is in this spelling already stays as it is, and so does an empty one.
    """
    written = row["target"]
    if row["task"] != "policy" or not written or policy.spelling_of(written) == spelling:
        return row
    answer, values = policy.parse(written), dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
    evals = [policy.format_eval(values[move], spelling.decimals) for move in answer.moves]
    width = len(row["prompt"]) - len(policy.PREFIX)
    return {**row, "target": policy.format_completion(answer.moves, evals, answer.best, spelling, width)}


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
