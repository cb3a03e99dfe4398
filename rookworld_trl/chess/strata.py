"""Kinds of moves and positions: what rare-event sampling draws from and what metrics are broken down by."""

import random
from collections.abc import Callable, Mapping

import chess

from rookworld_trl.chess.policy import win_chance

ENVIRONMENT_STRATA = (
    "illegal",
    "mate",
    "stalemate",
    "dead_material",
    "seventyfive_moves",
    "promotion",
    "en_passant",
    "en_passant_offered",
    "castle_king",
    "castle_queen",
    "castling_right_taken",
    "check",
    "capture",
    "quiet",
)
COMMON = ("illegal", "castle_king", "check", "capture", "quiet")
SCARCE = tuple(kind for kind in ENVIRONMENT_STRATA if kind not in COMMON)

# Of a tactical position: the win chance that the best move leaves at least (Lichess's formula; +110 centipawns), and
# how much less every other move leaves: a blunder is 15 points of win chance in Lichess's terms.
WINS, BLUNDER = 0.6, 0.15


def winning_move(values: Mapping[str, int]) -> str | None:
    """The one move that wins, by the centipawns of the legal moves (at least of the best two); None if none does."""
    if len(values) < 2:
        return None
    (best, value), (_, second) = sorted(values.items(), key=lambda pair: -pair[1])[:2]
    chance = win_chance(value)
    return best if chance >= WINS and chance - win_chance(second) >= BLUNDER else None


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
    """An illegal move, the kind drawn first (ILLEGAL_KINDS), half of the time among those that few positions offer."""
    scarce, common = list(ILLEGAL_KINDS)[:_SCARCE_ILLEGAL], list(ILLEGAL_KINDS)[_SCARCE_ILLEGAL:]
    rng.shuffle(scarce)
    rng.shuffle(common)
    for kind in scarce + common if rng.random() < 0.5 else common + scarce:
        if moves := ILLEGAL_KINDS[kind](board):
            return rng.choice(moves)
    raise ValueError(f"no illegal move was found in {board.fen()}")


def _exposed(board: chess.Board) -> list[chess.Move]:
    """Moves as the men move that leave the own king in check."""
    return [move for move in board.pseudo_legal_moves if not board.is_legal(move)]


def _pinned(board: chess.Board) -> list[str]:
    king = board.king(board.turn)
    return [] if board.is_check() else [move.uci() for move in _exposed(board) if move.from_square != king]


def _into_check(board: chess.Board) -> list[str]:
    return [move.uci() for move in _exposed(board) if move.from_square == board.king(board.turn)]


def _leaves_check(board: chess.Board) -> list[str]:
    king = board.king(board.turn)
    return [move.uci() for move in _exposed(board) if move.from_square != king] if board.is_check() else []


def _castling(board: chess.Board) -> list[str]:
    """Without the right, over men or through check."""
    home = "e1" if board.turn else "e8"
    if board.king(board.turn) != chess.parse_square(home):
        return []
    return [home + file + home[1] for file in "gc" if not board.is_legal(chess.Move.from_uci(home + file + home[1]))]


def _missing_promotion(board: chess.Board) -> list[str]:
    return sorted({move.uci()[:4] for move in board.legal_moves if move.promotion})


def _wrong_promotion(board: chess.Board) -> list[str]:
    """A move of a man that does not promote, with a piece behind it."""
    return [move.uci() + piece for move in board.legal_moves if not move.promotion for piece in "qn"]


def _wrong_pawn(board: chess.Board) -> list[str]:
    """A pawn that captures nothing, en passant without the right, runs into a man, or takes two steps too many."""
    moves = []
    legal = {move.uci()[:4] for move in board.pseudo_legal_moves}
    step = 8 if board.turn else -8
    for origin in chess.scan_forward(board.pawns & board.occupied_co[board.turn]):
        targets = list(chess.scan_forward(chess.BB_PAWN_ATTACKS[board.turn][origin] & ~board.occupied))
        targets += [square for square in (origin + step, origin + 2 * step, origin - step) if 0 <= square < 64]
        moves += [_written(board, origin, target) for target in targets]
    return [move for move in moves if move[:4] not in legal]


def _empty_square(board: chess.Board) -> list[str]:
    """From an empty square, as the queen or the knight moves."""
    moves = []
    for origin in chess.scan_forward(~board.occupied & chess.BB_ALL):
        for target in chess.scan_forward(_as_on_empty_board(chess.QUEEN, origin) | chess.BB_KNIGHT_ATTACKS[origin]):
            moves.append(chess.Move(origin, target).uci())
    return moves


def _wrong_colour(board: chess.Board) -> list[str]:
    """A move that the other side could make."""
    theirs = board.occupied_co[not board.turn]
    return [
        chess.Move(origin, target).uci()
        for origin in chess.scan_forward(theirs)
        for target in chess.scan_forward(board.attacks_mask(origin) & ~theirs)
    ]


def _own_man(board: chess.Board) -> list[str]:
    """Onto a man of one's own."""
    own = board.occupied_co[board.turn]
    return [
        _written(board, origin, target)
        for origin in chess.scan_forward(own)
        for target in chess.scan_forward(board.attacks_mask(origin) & own)
    ]


def _jump(board: chess.Board) -> list[str]:
    """A queen, rook or bishop over a man."""
    moves = []
    for origin in chess.scan_forward(board.occupied_co[board.turn] & (board.queens | board.rooks | board.bishops)):
        reach = _as_on_empty_board(board.piece_type_at(origin) or chess.QUEEN, origin) & ~board.attacks_mask(origin)
        moves += [chess.Move(origin, target).uci() for target in chess.scan_forward(reach)]
    return moves


def _geometry(board: chess.Board) -> list[str]:
    """As the man never moves."""
    moves = []
    for origin in chess.scan_forward(board.occupied_co[board.turn] & ~board.pawns):
        kind = board.piece_type_at(origin) or chess.QUEEN
        reach = _as_on_empty_board(kind, origin) | chess.BB_SQUARES[origin]
        if kind == chess.KING:  # two squares aside are castling
            reach |= chess.BB_RANK_ATTACKS[origin][0]
        moves += [chess.Move(origin, target).uci() for target in chess.scan_forward(~reach & chess.BB_ALL)]
    return moves


def _as_on_empty_board(kind: chess.PieceType, origin: chess.Square) -> chess.Bitboard:
    """The squares that a man other than a pawn reaches when nothing stands in its way."""
    lines = chess.BB_RANK_ATTACKS[origin][0] | chess.BB_FILE_ATTACKS[origin][0]
    diagonals = chess.BB_DIAG_ATTACKS[origin][0]
    return {
        chess.KNIGHT: chess.BB_KNIGHT_ATTACKS[origin],
        chess.KING: chess.BB_KING_ATTACKS[origin],
        chess.BISHOP: diagonals,
        chess.ROOK: lines,
        chess.QUEEN: lines | diagonals,
    }[kind]


def _written(board: chess.Board, origin: chess.Square, target: chess.Square) -> str:
    """The move in UCI, with a queen where a pawn reaches the last rank: what is wrong with it is something else."""
    last = chess.square_rank(target) == (7 if board.turn else 0)
    promotes = last and board.piece_type_at(origin) == chess.PAWN
    return chess.Move(origin, target, chess.QUEEN if promotes else None).uci()


_SCARCE_ILLEGAL = 7  # so many kinds, the first ones, are offered by few positions, or are the hardest to see
ILLEGAL_KINDS: dict[str, Callable[[chess.Board], list[str]]] = {
    "pinned": _pinned,
    "into_check": _into_check,
    "leaves_check": _leaves_check,
    "castling": _castling,
    "missing_promotion": _missing_promotion,
    "wrong_pawn": _wrong_pawn,
    "jump": _jump,
    "wrong_promotion": _wrong_promotion,
    "empty_square": _empty_square,
    "wrong_colour": _wrong_colour,
    "own_man": _own_man,
    "geometry": _geometry,
}
