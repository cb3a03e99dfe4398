"""Kinds of moves and positions, by which rows are drawn and metrics broken down, and what a move takes."""

import chess

ENVIRONMENT_STRATA = (
    *("illegal", "mate", "stalemate", "dead_material", "seventyfive_moves", "promotion", "en_passant"),
    *("en_passant_offered", "castle_king", "castle_queen", "castling_right_taken", "check", "capture", "quiet"),
)


def phase(board: chess.Board) -> str:
    """`opening`, `middlegame` or `endgame`: by the number of men other than pawns and kings, and by the move number."""
    pieces = chess.popcount(board.occupied & ~board.pawns & ~board.kings)
    if pieces <= 6:
        return "endgame"
    return "opening" if pieces >= 12 and board.fullmove_number <= 12 else "middlegame"


def stratum(board: chess.Board, uci: str) -> str:
    """The rarest kind a move is of (ENVIRONMENT_STRATA, rarest first); `board` is left as it was."""
    move = chess.Move.from_uci(uci)
    if not board.is_legal(move):
        return "illegal"
    board.push(move)
    check, stuck = board.is_check(), not any(board.generate_legal_moves())
    dead, worn = board.is_insufficient_material(), board.is_seventyfive_moves()
    offered, rights = board.has_legal_en_passant(), board.castling_rights
    board.pop()
    if stuck:
        return "mate" if check else "stalemate"
    if dead or worn:
        return "dead_material" if dead else "seventyfive_moves"
    if move.promotion:
        return "promotion"
    if board.is_en_passant(move):
        return "en_passant"
    if board.is_castling(move):
        return "castle_king" if board.is_kingside_castling(move) else "castle_queen"
    if offered:
        return "en_passant_offered"
    if (rights ^ board.castling_rights) & (chess.BB_RANK_8 if board.turn else chess.BB_RANK_1):
        return "castling_right_taken"  # the other side's, with its rook
    if check:
        return "check"
    return "capture" if board.is_capture(move) else "quiet"


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
