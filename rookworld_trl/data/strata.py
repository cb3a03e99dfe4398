"""Kinds of moves and phases of positions: what rare-event sampling draws from and what metrics are broken down by."""

import random

import chess

ENVIRONMENT_STRATA = (
    "illegal",
    "mate",
    "stalemate",
    "draw",
    "promotion",
    "en_passant",
    "castle_king",
    "castle_queen",
    "check",
    "capture",
    "quiet",
)
SCARCE = ("mate", "stalemate", "draw", "promotion", "en_passant", "castle_queen")


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
    drawn = board.is_insufficient_material() or board.is_seventyfive_moves()
    board.pop()
    if stuck:
        return "mate" if check else "stalemate"
    if drawn:
        return "draw"
    if move.promotion:
        return "promotion"
    if board.is_en_passant(move):
        return "en_passant"
    if board.is_castling(move):
        return "castle_king" if board.is_kingside_castling(move) else "castle_queen"
    if check:
        return "check"
    return "capture" if board.is_capture(move) else "quiet"


def rare_move(board: chess.Board, rng: random.Random) -> str:
    """A legal move, the kind drawn first and evenly among the kinds the position offers, so that rare ones come up."""
    kinds: dict[str, list[str]] = {}
    for move in board.legal_moves:
        kinds.setdefault(stratum(board, move.uci()), []).append(move.uci())
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def scarce_move(board: chess.Board, rng: random.Random) -> str | None:
    """A legal move of a kind that few positions offer (SCARCE), the kind drawn first; None where there is none."""
    kinds: dict[str, list[str]] = {}
    for move in board.legal_moves:
        if (kind := stratum(board, move.uci())) in SCARCE:
            kinds.setdefault(kind, []).append(move.uci())
    return rng.choice(kinds[rng.choice(sorted(kinds))]) if kinds else None


def illegal_move(board: chess.Board, rng: random.Random) -> str:
    """An illegal move: into check or out of a pin if there is one, else a wrong geometry, man or empty square."""
    legal = {move.uci() for move in board.legal_moves}
    tempting = [move.uci() for move in board.pseudo_legal_moves if move.uci() not in legal]
    if tempting and rng.random() < 0.5:
        return rng.choice(tempting)
    origins = list(chess.scan_forward(board.occupied_co[board.turn]))
    if rng.random() < 0.2:
        origins = list(chess.SQUARES)
    while True:
        origin, target = rng.choice(origins), rng.choice(chess.SQUARES)
        uci = chess.Move(origin, target).uci()
        if origin != target and uci not in legal and uci + "q" not in legal:
            return uci
