"""Rows for the reward tests: hand-picked positions, values made up by a fixed rule, truth written by python-chess."""

import random
from collections.abc import Sequence

import chess

from rookworld_trl.chess import policy

# (FEN, move, what it shows); every move is legal unless it says otherwise.
TRANSITIONS = {
    "quiet": (chess.STARTING_FEN, "g1f3"),
    "double_step": (chess.STARTING_FEN, "e2e4"),
    "capture": ("rnbqkbnr/ppp1pppp/8/3p4/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2", "e4d5"),
    "check": ("rnbqkbnr/ppppp1pp/8/5p2/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2", "d1h5"),
    "castle_king_white": ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1g1"),
    "castle_queen_white": ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1c1"),
    "castle_king_black": ("r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 0 1", "e8g8"),
    "castle_queen_black": ("r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 0 1", "e8c8"),
    "en_passant": ("rnbqkbnr/ppp1p1pp/8/3pPp2/8/8/PPPP1PPP/RNBQKBNR w KQkq f6 0 3", "e5f6"),
    "promotion": ("8/4P1k1/8/8/8/8/8/4K3 w - - 0 1", "e7e8q"),
    "under_promotion": ("8/4P1k1/8/8/8/8/8/4K3 w - - 0 1", "e7e8n"),
    "capture_promotion": ("3r4/4P1k1/8/8/8/8/8/4K3 w - - 0 1", "e7d8r"),
    "mate": ("rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq - 0 2", "d8h4"),
    "stalemate": ("7k/8/5KQ1/8/8/8/8/8 w - - 0 1", "g6f7"),
    "insufficient_material": ("8/8/8/3k4/8/8/3p4/3K4 w - - 0 1", "d1d2"),
    "last_move_of_75": ("8/8/4k3/8/8/4K3/8/R7 w - - 149 120", "a1a2"),
    "illegal_pinned": ("4k3/4r3/8/8/8/8/4N3/4K3 w - - 3 20", "e2c3"),
    "illegal_geometry": (chess.STARTING_FEN, "a1a5"),
    "illegal_wrong_colour": (chess.STARTING_FEN, "e7e5"),
}

POLICY_FENS = {
    "start": chess.STARTING_FEN,
    "black_to_move": "r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R b KQkq - 3 3",
    "endgame": "8/5k2/8/8/3K4/8/4P3/8 w - - 0 1",
    "three_legal": "7k/8/8/8/8/8/8/K7 w - - 0 1",
    "two_legal": "8/8/8/8/8/2k5/8/K7 w - - 0 1",
    "one_legal": "7k/8/6KP/8/8/8/8/5R2 b - - 0 1",
    "promotion": "8/4P1k1/8/8/8/8/8/4K3 w - - 0 1",
}


def spread_values(fen: str) -> tuple[list[str], list[int]]:
    """Legal moves with clearly different values: 150 cp apart from +300 down, in an order that a seed shuffles."""
    moves = sorted(move.uci() for move in chess.Board(fen).legal_moves)
    values = [300 - 150 * i for i in range(len(moves))]
    random.Random(fen).shuffle(values)
    return moves, values


def best_first(moves: list[str], values: list[int]) -> list[tuple[str, int]]:
    return sorted(zip(moves, values, strict=True), key=lambda pair: -pair[1])


def format_row(
    fen: str, moves: Sequence[str], evals: Sequence[str], best: str, spelling: policy.Spelling = policy.SINGLE
) -> str:
    """A whole `P:` row: prompt and completion."""
    return policy.prompt(fen) + policy.format_completion(moves, evals, best, spelling, len(fen))
