"""What a move wins in pieces, in pawns' worth (1, 3, 3, 5, 9)."""

import chess

_WORTH = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9}


def material_won(board: chess.Board, move: chess.Move) -> int:
    """The worth of the man that a legal move takes, and what a promotion adds."""
    taken = chess.PAWN if board.is_en_passant(move) else board.piece_type_at(move.to_square)
    # Castling is written as the king's move here, so it never lands on the rook.
    return _WORTH.get(taken or 0, 0) + (_WORTH[move.promotion] - _WORTH[chess.PAWN] if move.promotion else 0)
