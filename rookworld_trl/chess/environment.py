"""The environment task `A:`: a position and a move in, the next position and what it earned out.

    A: <FEN>+<UCI move>+<last <=10 moves incl. this one>+<new FEN>+<reward>+<terminated>+<truncated>

Ground truth comes from python-chess. Unlike the generator of the public rows, legality is checked: an illegal move
leaves the position as it is, to the letter, costs -1 and truncates.
"""

import re
from dataclasses import dataclass

from rookworld_trl.chess.format import (
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


def transition(fen: str, move: str) -> EnvironmentOutput:
    """Ground truth of a move: the next position, the reward and the two flags.

    Rewards: 0.001 for a legal move, 1 for giving mate, 0.5 for a draw, -1 for an illegal move. The game ends by
    itself on mate, stalemate, dead material and the 75-move rule, as `chess.Board.outcome()` has it and as the public
    rows are labelled. Nobody claims a draw.

    Args:
        fen: a legal position.
        move: UCI; anything that is not a legal move, malformed text included, counts as illegal.

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
        return EnvironmentOutput(fen, REWARD_ILLEGAL, False, True)  # as it is written: the answer is a verbatim copy
    board.push(parsed)
    if board.is_checkmate():
        return EnvironmentOutput(board.fen(), REWARD_MATE, True, False)
    drawn = board.outcome() is not None
    return EnvironmentOutput(board.fen(), REWARD_DRAW if drawn else REWARD_LEGAL, drawn, False)
