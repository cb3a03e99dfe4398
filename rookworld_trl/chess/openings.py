"""Where games begin: positions some random plies from the start, or those of a file."""

import csv
import random
from pathlib import Path

import chess

from rookworld_trl.chess.material import clean


def random_opening(rng: random.Random, plies: int) -> chess.Board:
    """A position `plies` random legal plies from the start, those plies on its move stack; never a finished game."""
    while True:
        board = chess.Board()
        for _ in range(plies):
            moves = list(board.legal_moves)
            if not moves:
                break
            board.push(rng.choice(moves))
        if not board.is_game_over():
            return board


def random_openings(count: int, seed: int = 0, plies: int = 4) -> list[str]:
    """FENs of positions that many random legal plies from the start."""
    rng = random.Random(seed)
    return [random_opening(rng, plies).fen() for _ in range(count)]


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
