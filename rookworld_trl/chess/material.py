"""What python-chess leaves open about a board: what a move wins, which moves mate, marks that mean nothing."""

import chess

_WORTH = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9}


def material_won(board: chess.Board, move: chess.Move) -> int:
    """The worth of the man that a legal move takes, and what a promotion adds, in pawns (1, 3, 3, 5, 9)."""
    taken = chess.PAWN if board.is_en_passant(move) else board.piece_type_at(move.to_square)
    # Castling is written as the king's move here, so it never lands on the rook.
    return _WORTH.get(taken or 0, 0) + (_WORTH[move.promotion] - _WORTH[chess.PAWN] if move.promotion else 0)


def mating_moves(board: chess.Board) -> list[chess.Move]:
    """The moves that checkmate at once, in UCI order."""
    found = []
    for move in board.legal_moves:
        if board.gives_check(move):
            board.push(move)
            if board.is_checkmate():
                found.append(move)
            board.pop()
    return sorted(found, key=chess.Move.uci)


def clean(board: chess.Board) -> None:
    """Take back castling rights and en passant squares that mean nothing, which many files have.

    Raises:
        ValueError: the position is illegal all the same, or the game is over.
    """
    board.castling_rights = board.clean_castling_rights()
    if not board.has_legal_en_passant():
        board.ep_square = None
    if not board.is_valid():
        raise ValueError(f"the position {board.fen()} is illegal")
    if not any(board.legal_moves):
        raise ValueError(f"the game is over in {board.fen()}")
