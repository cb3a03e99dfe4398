"""Where matches begin: positions some random plies from the start, or those of a file."""

import random
from pathlib import Path

import chess

from rookworld_trl.data.generation import read_openings as read_lines
from rookworld_trl.evaluation.problem_files import clean
from rookworld_trl.play import random_opening


def random_openings(count: int, seed: int = 0, plies: int = 4) -> list[str]:
    """FENs of positions that many random legal plies from the start."""
    rng = random.Random(seed)
    return [random_opening(rng, plies).fen() for _ in range(count)]


def read_openings(path: Path, count: int, seed: int = 0) -> list[str]:
    """FENs drawn from a file: lichess-org/chess-openings' `.tsv` (the ends of its lines), or a FEN or EPD a line.

    Raises:
        ValueError: fewer than `count` openings, or a malformed one; names the file and the line.
    """
    fens = []
    if path.suffix.lower() == ".tsv":
        for line in read_lines(path):
            board = chess.Board()
            for uci in line:
                board.push_uci(uci)
            fens.append(board.fen())
    else:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not text.strip():
                continue
            words = text.split()
            clocks = words[4:6] if all(word.isdigit() for word in words[4:6]) and len(words) >= 6 else ["0", "1"]
            try:
                board = chess.Board(" ".join([*words[:4], *clocks]))
                clean(board)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            fens.append(board.fen())
    fens = list(dict.fromkeys(fens))
    if len(fens) < count:
        raise ValueError(f"{path}: holds {len(fens)} different openings, {count} are to be played; play fewer games")
    return random.Random(seed).sample(fens, count)
