"""Kinds of moves: what counts as which, and that scarce ones are found wherever a position offers them."""

import random

import chess
import pytest

from rookworld_trl.chess.strata import SCARCE, scarce_move, stratum

OFFERED = {
    "mate": ("6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1", {"a1a8"}),
    "stalemate": ("7k/8/5KQ1/8/8/8/8/8 w - - 0 1", {"g6f7", "f6e5", "f6f5", "f6g5", "f6e6", "f6e7", "f6f7"}),
    "promotion": ("8/P6k/8/8/8/8/8/K7 w - - 0 1", {"a7a8q", "a7a8r", "a7a8b", "a7a8n"}),
    "en_passant": ("rnbqkbnr/ppp1pppp/8/8/3pP3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 3", {"d4e3"}),
    "castle_queen": ("4k3/pppppppp/8/8/8/8/PPPPPPPP/R3K3 w Q - 0 1", {"e1c1"}),
}


@pytest.mark.parametrize("kind", OFFERED)
def test_a_scarce_move_is_drawn_where_there_is_one(kind: str) -> None:
    fen, moves = OFFERED[kind]
    board = chess.Board(fen)
    drawn = {scarce_move(board, random.Random(seed)) for seed in range(60)}
    by_kind = {move for move in drawn if stratum(board, move) == kind}
    assert kind in SCARCE
    assert by_kind
    assert by_kind <= moves
    assert all(stratum(board, move) in SCARCE for move in drawn)
    assert board.fen() == fen


def test_most_positions_offer_none() -> None:
    assert scarce_move(chess.Board(), random.Random(0)) is None
