"""The environment task `A:`: a position and a move in, the next position and what it earned out.

    A: <FEN>+<UCI move>+<last <=10 moves incl. this one>+<new FEN>+<reward>+<terminated>+<truncated>

Ground truth comes from python-chess. Unlike the generator of the public rows, legality is checked: an illegal move
leaves the position as it is, costs -1 and truncates.
"""

import re
from dataclasses import dataclass

import chess

from rookworld_trl.tasks.formats import (
    FEN_PATTERN,
    HISTORY_LENGTH,
    MOVE_PATTERN,
    ParseError,
    board_from_fen,
    check_fen_text,
)

PREFIX = "A: "
REWARD_LEGAL = 0.001
REWARD_MATE = 1.0
REWARD_DRAW = 0.5
REWARD_ILLEGAL = -1.0

_PROMPT = re.compile(f"{PREFIX}({FEN_PATTERN})\\+({MOVE_PATTERN})\\+({MOVE_PATTERN}(?: {MOVE_PATTERN})*)?\\+")
_COMPLETION = re.compile(r"([^+]*)\+([^+]*)\+([^+]*)\+([^+]*)")
_NUMBER = re.compile(r"-?[0-9]{1,2}(?:\.[0-9]{1,6})?")

# Squares a king or rook leaves when castling rights may change; a rewind past such a move proves nothing.
_CASTLING_HOMES = chess.BB_A1 | chess.BB_E1 | chess.BB_H1 | chess.BB_A8 | chess.BB_E8 | chess.BB_H8


@dataclass(frozen=True, slots=True)
class EnvironmentInput:
    """A parsed `A:` prompt; `history` ends with `move` when it is given at all."""

    fen: str
    move: str
    history: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnvironmentOutput:
    """A parsed `A:` completion, or the ground truth of one.

    Attributes:
        fen: the position behind the move.
        reward: what the move earned; see `transition`.
        terminated: the game is over by the rules.
        truncated: the move was illegal.
    """

    fen: str
    reward: float
    terminated: bool
    truncated: bool


def prompt(fen: str, move: str, history: list[str] | tuple[str, ...]) -> str:
    """The prompt for a move; `history` holds the moves before it, oldest first, any number of them."""
    return f"{PREFIX}{fen}+{move}+{' '.join([*history, move][-HISTORY_LENGTH:])}+"


def completion_start(text: str) -> int:
    """Character offset where the completion of an `A:` row starts: right behind the third `+`.

    Raises:
        ParseError: the prompt part is malformed.
    """
    match = _PROMPT.match(text)
    if match is None:
        raise ParseError("prompt", text[:200], "write 'A: <FEN>+<move>+<last moves>+'")
    return match.end()


def parse_prompt(text: str) -> EnvironmentInput:
    """Read an `A:` prompt strictly.

    Raises:
        ParseError: the text is not exactly `A: <FEN>+<move>+<history>+`.
    """
    match = _PROMPT.fullmatch(text)
    if match is None:
        raise ParseError("prompt", text, "write 'A: <FEN>+<move>+<last moves>+' and nothing else")
    fen, move, history = match.groups()
    return EnvironmentInput(fen, move, tuple((history or "").split()))


def parse(completion: str) -> EnvironmentOutput:
    """Read a completion strictly: the whole text must be `<FEN>+<reward>+<terminated>+<truncated>`.

    Raises:
        ParseError: naming the field that is wrong.
    """
    match = _COMPLETION.fullmatch(completion)
    if match is None:
        raise ParseError("fields", completion, "write '<FEN>+<reward>+<terminated>+<truncated>' and nothing else")
    fen, reward, terminated, truncated = match.groups()
    check_fen_text(fen)
    if _NUMBER.fullmatch(reward) is None:
        raise ParseError("reward", reward, "write a decimal number")
    for field, flag in (("terminated", terminated), ("truncated", truncated)):
        if flag not in ("0", "1"):
            raise ParseError(field, flag, "write 0 or 1")
    return EnvironmentOutput(fen, float(reward), terminated == "1", truncated == "1")


def format_completion(output: EnvironmentOutput) -> str:
    """Write a completion."""
    return f"{output.fen}+{output.reward}+{int(output.terminated)}+{int(output.truncated)}"


def transition(
    fen: str, move: str, history: list[str] | tuple[str, ...] = (), claim_draw: bool = False
) -> EnvironmentOutput:
    """Ground truth of a move: the next position, the reward and the two flags.

    Rewards: 0.001 for a legal move, 1 for giving mate, 0.5 for a draw, -1 for an illegal move. The game ends by
    itself on mate, stalemate, dead material, the 75-move rule and fivefold repetition, as
    `chess.Board.outcome()` has it and as the public rows are labelled. With `claim_draw` it also ends where a
    player may claim: the 50-move rule, and a threefold repetition that `history` proves.

    Args:
        fen: a legal position.
        move: UCI; anything that is not a legal move, malformed text included, counts as illegal.
        history: the moves before this one, oldest first (this one too, at the end, is accepted).

    Raises:
        ParseError: `fen` is malformed or its position illegal.
    """
    board = board_from_fen(fen)
    try:
        parsed = board.parse_uci(move)
        legal = bool(parsed) and parsed.uci() == move  # python-chess also takes e1h1 for castling and 0000 for none
    except ValueError:
        legal = False
    if not legal:
        return EnvironmentOutput(board.fen(), REWARD_ILLEGAL, False, True)
    if claim_draw:
        board = _rewound(board, tuple(history)[:-1] if history and history[-1] == move else tuple(history))
    board.push(parsed)
    if board.is_checkmate():
        return EnvironmentOutput(board.fen(), REWARD_MATE, True, False)
    drawn = board.outcome() is not None
    if claim_draw and not drawn:
        drawn = board.is_fifty_moves() or board.is_repetition(3)
    return EnvironmentOutput(board.fen(), REWARD_DRAW if drawn else REWARD_LEGAL, drawn, False)


def _rewound(board: chess.Board, history: tuple[str, ...]) -> chess.Board:
    """The same position with as many of the `history` moves on its stack as can be taken back with certainty.

    Only quiet moves inside the half-move clock can be taken back without knowing what was captured. The rewind
    stops at a move that may have changed castling rights, so a repetition found on the stack is a proven one.
    """
    root = board.copy(stack=False)
    taken_back: list[chess.Move] = []
    for uci in reversed(history[-HISTORY_LENGTH:]):
        if len(taken_back) == board.halfmove_clock or not re.fullmatch(MOVE_PATTERN, uci) or uci[:2] == uci[2:4]:
            break
        move = chess.Move.from_uci(uci)
        piece = root.piece_at(move.to_square)
        mover = not root.turn
        if piece is None or piece.color != mover or piece.piece_type == chess.PAWN or root.piece_at(move.from_square):
            break
        if chess.BB_SQUARES[move.from_square] & _CASTLING_HOMES and piece.piece_type in (chess.KING, chess.ROOK):
            break
        root.remove_piece_at(move.to_square)
        root.set_piece_at(move.from_square, piece)
        root.turn = mover
        root.ep_square = None
        root.halfmove_clock -= 1
        root.fullmove_number -= mover == chess.BLACK
        if move not in root.legal_moves:
            root.push(move)  # an inconsistent history: keep what was proven so far
            root.clear_stack()
            break
        taken_back.append(move)
    if taken_back and root.halfmove_clock == 0 and _may_capture_en_passant(root, history[: -len(taken_back)]):
        # Not the same position as later ones that look like it, where the right to capture is gone.
        root.push(taken_back.pop())
        root.clear_stack()
    for move in reversed(taken_back):
        root.push(move)
    return root


def _may_capture_en_passant(board: chess.Board, history: tuple[str, ...]) -> bool:
    """Whether the move that led to `board`, the last of `history` if there is one, may allow a capture en passant."""
    ranks = (6, 5, 4) if board.turn == chess.WHITE else (1, 2, 3)
    probe = board.copy(stack=False)
    for file in range(8):
        origin, passed, target = (chess.square(file, r) for r in ranks)
        step = chess.SQUARE_NAMES[origin] + chess.SQUARE_NAMES[target]
        pawn = board.piece_at(target) == chess.Piece(chess.PAWN, not board.turn)
        if pawn and not board.piece_at(origin) and (not history or history[-1] == step):
            probe.ep_square = passed
            if probe.has_legal_en_passant():
                return True
    return False
