"""Text shapes that both tasks share: FEN, UCI moves, and the one error that parsing raises."""

import re

import chess

FEN_PATTERN = (
    r"[pnbrqkPNBRQK1-8]{1,8}(?:/[pnbrqkPNBRQK1-8]{1,8}){7} [wb] (?:-|K?Q?k?q?(?<! )) (?:-|[a-h][36])"
    r" [0-9]{1,4} [0-9]{1,5}"
)
MOVE_PATTERN = r"[a-h][1-8][a-h][1-8][qrbn]?"
HISTORY_LENGTH = 10

_FEN = re.compile(FEN_PATTERN)
_ADJACENT_DIGITS = re.compile("[1-8][1-8]")
_SQUARES = str.maketrans({str(n): "." * n for n in range(1, 9)})


class ParseError(ValueError):
    """A text that does not follow the task's format.

    Attributes:
        field: the part that is wrong (`fen`, `moves`, `evals`, `best`, `reward`, ...).
        value: what stood there, shortened.
    """

    def __init__(self, field: str, value: str, remedy: str):
        self.field = field
        self.value = value if len(value) <= 120 else value[:117] + "..."
        super().__init__(f"field '{field}': {self.value!r} is malformed; {remedy}")


def squares(placement: str) -> str | None:
    """Expand a FEN placement to its 64 squares, a8 first, `.` for empty; None unless there are 8 ranks of 8.

    Two digits side by side are no FEN (`44` for `8`), so squares and placement determine each other.
    """
    if _ADJACENT_DIGITS.search(placement):
        return None
    ranks = placement.translate(_SQUARES).split("/")
    if len(ranks) != 8 or any(len(rank) != 8 for rank in ranks):
        return None
    return "".join(ranks)


def check_fen_text(fen: str) -> str:
    """Return `fen` if it is spelled as a FEN: six fields, 8 ranks of 8 squares. The position may still be illegal.

    Raises:
        ParseError: it is not.
    """
    if _FEN.fullmatch(fen) is None or squares(fen.split(" ", 1)[0]) is None:
        raise ParseError("fen", fen, "write the six FEN fields with eight ranks of eight squares each")
    return fen


def board_from_fen(fen: str) -> chess.Board:
    """A legal position from a FEN.

    Raises:
        ParseError: the text is no FEN, or python-chess finds the position illegal (no king, wrong side in check, ...).
    """
    try:
        board = chess.Board(check_fen_text(fen))
    except ParseError:
        raise
    except ValueError as error:
        raise ParseError("fen", fen, str(error)) from error
    if not board.is_valid():
        problems = ", ".join(flag.name or "" for flag in chess.Status if flag & board.status() and flag.name)
        raise ParseError("fen", fen, f"the position is illegal ({problems.lower()})")
    return board


def position_key(fen: str) -> str:
    """The position without its clocks: the first four FEN fields. Splits and duplicates go by this key.

    Many programs write an en passant square after every double step; only one that can be taken on makes a position
    of its own.
    """
    fields = fen.split(" ", 4)[:4]
    if fields[-1] != "-" and not chess.Board(fen).has_legal_en_passant():
        fields[-1] = "-"
    return " ".join(fields)
