"""Moves of `A:` rows to train on: legal ones of every kind, illegal ones of every kind, and rows of them."""

import functools
import random
from collections.abc import Callable
from typing import Any

import chess

from rookworld_trl.chess import environment
from rookworld_trl.chess.strata import ENVIRONMENT_STRATA, stratum

ILLEGAL_SHARE, RARE_SHARE = 0.25, 0.3  # of the moves of `A:` rows; the others are the one played or any legal one

# Half of the `A:` rows show all the moves before that are known, up to nine; the others any number of them, so that a
# model does not learn to lean on a full history. Some show a position of no game with other clocks, where the fifty-
# and the seventy-five-move rule are near.
WHOLE_HISTORY_SHARE = 0.5
CLOCK_SHARE = 0.06
COMMON = ("illegal", "castle_king", "check", "capture", "quiet")
SCARCE = tuple(kind for kind in ENVIRONMENT_STRATA if kind not in COMMON)


def choose_move(record: dict[str, Any], rng: random.Random) -> str:
    """The move of an `A:` row: the one played, a random legal one, a rare one, or an illegal one."""
    board = chess.Board(record["fen"])
    draw = rng.random()
    if draw < ILLEGAL_SHARE:
        return illegal_move(board, rng)
    if draw < ILLEGAL_SHARE + RARE_SHARE:
        return rare_move(board, rng)
    if draw < ILLEGAL_SHARE + RARE_SHARE + (1 - ILLEGAL_SHARE - RARE_SHARE) / 2:
        return rng.choice([legal.uci() for legal in board.legal_moves])
    return str(record["played"])


def cut_history(history: list[str], rng: random.Random) -> list[str]:
    """The moves before a position, or the last few of them, of each number alike."""
    if rng.random() < WHOLE_HISTORY_SHARE:
        return history
    return history[len(history) - rng.randint(0, len(history)) :]


def with_clocks(fen: str, rng: random.Random) -> str | None:
    """The position late in a game without captures and pawn moves; None where the last move was a double step."""
    *fields, en_passant, _, number = fen.split()
    if en_passant != "-":
        return None
    clock = rng.choice((149, 149, rng.randint(140, 149), rng.randint(97, 101), rng.randint(0, 149)))
    return " ".join((*fields, "-", str(clock), str(max(int(number), clock // 2 + rng.randint(1, 60)))))


def environment_row(record: dict[str, Any], move: str) -> dict[str, str]:
    """An `A:` row, with the FEN after the move beside it."""
    output = environment.transition(record["fen"], move)
    return {
        "prompt": environment.prompt(record["fen"], move, record["history"].split()),
        "completion": environment.format_completion(output),
        "after": output.fen,
    }


def environment_rows(record: dict[str, Any], number: int, scarce: bool, rng: random.Random) -> list[dict[str, str]]:
    """`A:` rows of one position, no move twice: so many, and one of a scarce kind of move if asked for and offered."""
    moves = dict.fromkeys(choose_move(record, rng) for _ in range(number))
    if scarce and (move := scarce_move(chess.Board(record["fen"]), rng)):
        moves.setdefault(move)
    rows = []
    for move in moves:
        late = with_clocks(record["fen"], rng) if rng.random() < CLOCK_SHARE else None
        history = "" if late else " ".join(cut_history(record["history"].split(), rng))
        rows.append(environment_row(record | {"fen": late or record["fen"], "history": history}, move))
    return rows


def rare_move(board: chess.Board, rng: random.Random) -> str:
    """A legal move, the kind drawn first and evenly among the kinds the position offers, so that rare ones come up."""
    kinds = _by_kind(board)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def scarce_move(board: chess.Board, rng: random.Random) -> str | None:
    """A legal move of a kind that few positions offer (SCARCE), the kind drawn first; None where there is none."""
    kinds = {kind: moves for kind, moves in _by_kind(board).items() if kind in SCARCE}
    return rng.choice(kinds[rng.choice(sorted(kinds))]) if kinds else None


def _by_kind(board: chess.Board) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for move in board.legal_moves:
        kinds.setdefault(stratum(board, move.uci()), []).append(move.uci())
    return kinds


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


@functools.cache
def _as_on_empty_board(kind: chess.PieceType, origin: chess.Square) -> chess.Bitboard:
    """The squares that a man other than a pawn reaches when nothing stands in its way."""
    board = chess.BaseBoard(None)
    board.set_piece_at(origin, chess.Piece(kind, chess.WHITE))
    return board.attacks_mask(origin)


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
