"""Positions with a mate in one, by python-chess alone: the same for a seed, on every machine."""

import gzip
import random
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import chess

from rookworld_trl.data.dataset import SHIPPED_DIRECTORY
from rookworld_trl.tasks import position_key
from rookworld_trl.tasks.boards import material_won, mating_moves

MATES_FILE: Path = SHIPPED_DIRECTORY / "mate_in_one.epd.gz"
COUNT, SEED = 1_200, 0  # of the shipped file
MAX_PLIES = 160
# Share of moves that take the most material; the others are random. One share a game, from wild games to greedy ones.
GREEDY_SHARES = (0.0, 0.3, 0.6)


def mates(count: int = COUNT, seed: int = SEED, taken: Container[str] = ()) -> Iterator[str]:
    """EPD lines of different positions, White and Black to mate in turn; `bm` has every mating move.

    Each is the first position of a noisy game in which that colour can mate. The move clocks are in `hmvc` and `fmvn`.

    Args:
        taken: positions to leave out, by `position_key`.
    """
    seen: set[str] = set()
    game = 0
    while len(seen) < count:
        board = first_mate(random.Random(f"{seed}:{game}"), colour=len(seen) % 2 == 0)
        game += 1
        if board is None or (key := position_key(board.fen())) in seen or key in taken:
            continue
        seen.add(key)
        clocks: dict[str, Any] = {"hmvc": board.halfmove_clock, "fmvn": board.fullmove_number}
        yield board.epd(bm=mating_moves(board), id=f"mate in one {len(seen)}", **clocks)


def first_mate(rng: random.Random, colour: chess.Color) -> chess.Board | None:
    """Play a game up to the first position in which `colour` can mate; None where there is none."""
    board, share = chess.Board(), rng.choice(GREEDY_SHARES)
    for _ in range(MAX_PLIES):
        moves = sorted(board.legal_moves, key=chess.Move.uci)
        if not moves or board.is_insufficient_material():
            return None
        if board.turn == colour and mating_moves(board):
            return board
        if rng.random() < share:
            won = [material_won(board, move) for move in moves]
            moves = [move for move, worth in zip(moves, won, strict=True) if worth == max(won)]
        board.push(rng.choice(moves))
    return None


def write_mates(path: Path, taken: Container[str], count: int = COUNT, seed: int = SEED) -> None:
    """Write `mates` as a compressed EPD file, the same bytes each time."""
    text = "".join(f"{line}\n" for line in mates(count, seed, taken))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
