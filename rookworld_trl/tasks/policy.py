"""The policy task `P:`: a position in, candidate moves, their evals and the best move out.

    P: <FEN> M: <up to 5 UCI moves> E: <one eval each> B: <best move>

Evals are in pawns from the mover's side; mates stand as about +-1000. RookWorld pads its fields with spaces
(`P: {fen:90}M: {moves:30}E: {evals:40}B: {best}`); both that text and the single-spaced one parse. Spaces beyond a
field's width, or behind the best move, belong to neither.
"""

import math
import re
from dataclasses import dataclass

from rookworld_trl.tasks.formats import FEN_PATTERN, MOVE_PATTERN, ParseError

PREFIX = "P: "
MAX_CANDIDATES = 5
MATE_PAWNS = 1000.0
_CHANCE_SLOPE = 0.00368208  # of `win_chance`, a centipawn
MATE_CP = 9000  # an engine value from here on is a mate: +-(10000 - moves to mate)

# Widths of RookWorld's fields. A FEN has 25 characters or more.
_FEN_WIDTH, _MOVES_WIDTH, _EVALS_WIDTH = 90, 30, 40

_EVAL = r"[+-]?[0-9]{1,4}(?:\.[0-9]{1,4})?"
_PROMPT = re.compile(f"{PREFIX}({FEN_PATTERN})")
# Sections in order, anything but a section letter inside: says which section is missing before its content is read.
_SECTIONS = re.compile(rf" {{0,{_FEN_WIDTH - 25}}}M:(?P<moves>[^MEB:]*)E:(?P<evals>[^MEB:]*)B:(?P<best>[^MEB:]*)")
_MOVES = re.compile(f"(?: {MOVE_PATTERN})+ *")
_EVALS = re.compile(f"(?: {_EVAL})+ *")
_BEST = re.compile(f" {MOVE_PATTERN}")


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """A parsed `P:` completion. Well-formed only: moves may still be illegal, repeated, or miscounted.

    Attributes:
        moves: the candidates, UCI.
        evals: in pawns from the mover's side, mates about +-1000; as many as were written.
        best: the chosen move, UCI.
    """

    moves: tuple[str, ...]
    evals: tuple[float, ...]
    best: str


def prompt(fen: str) -> str:
    """The prompt for a position: ends with the FEN, so that the model writes the padding itself."""
    return PREFIX + fen


def completion_start(text: str) -> int:
    """Character offset where the completion of a `P:` row starts: right behind the FEN.

    Raises:
        ParseError: no FEN stands behind the prefix.
    """
    match = _PROMPT.match(text)
    if match is None:
        raise ParseError("fen", text[: len(PREFIX) + 90], "write 'P: ' and a FEN of six fields")
    return match.end()


def parse_prompt(text: str) -> str:
    """The FEN of a `P:` prompt; padding behind it is allowed.

    Raises:
        ParseError: anything but a FEN and spaces stands behind the prefix.
    """
    end = completion_start(text)
    if text[end:].strip(" "):
        raise ParseError("prompt", text[end:], "end the prompt with the FEN")
    return text[len(PREFIX) : end]


def parse(completion: str) -> PolicyOutput:
    """Read a completion strictly: the whole text must be `M: ... E: ... B: ...`, padded or single-spaced.

    Raises:
        ParseError: naming the section that is wrong.
    """
    sections = _SECTIONS.fullmatch(completion)
    if sections is None:
        raise ParseError("sections", completion, "write 'M: <moves> E: <evals> B: <move>' and nothing else")
    moves, evals, best = sections["moves"], sections["evals"], sections["best"]
    if _MOVES.fullmatch(moves) is None or not _well_spaced(moves, _MOVES_WIDTH):
        raise ParseError("moves", moves, "write UCI moves with one space between them")
    if _EVALS.fullmatch(evals) is None or not _well_spaced(evals, _EVALS_WIDTH):
        raise ParseError("evals", evals, "write decimal numbers with one space between them")
    if _BEST.fullmatch(best) is None:
        raise ParseError("best", best, "write one UCI move and nothing behind it")
    return PolicyOutput(tuple(moves.split()), tuple(map(float, evals.split())), best[1:])


def _well_spaced(section: str, width: int) -> bool:
    """One space behind the content of a section, or more up to the field's width (a space leads it)."""
    return section.endswith(" ") and (len(section) <= 1 + width or not section.endswith("  "))


def format_eval(centipawns: int, decimals: int = 2) -> str:
    """Write an eval in pawns from the mover's side, so that moves of different values are told apart where it matters.

    Two decimals below 10 pawns, as RookWorld's rows have them (or one, to a tenth), whole pawns up to 30 and no
    further; a mate (`MATE_CP` or beyond) is +-1000.0.
    """
    if abs(centipawns) >= MATE_CP:
        return f"{math.copysign(MATE_PAWNS, centipawns):.1f}"
    pawns = centipawns / 100
    if abs(round(pawns, decimals)) < 10:
        return f"{round(pawns, decimals) + 0.0:.{decimals}f}"
    return f"{max(-30.0, min(30.0, float(round(pawns)))):.1f}"


def format_completion(moves: list[str], evals: list[str], best: str, padded: bool = False) -> str:
    """Write a completion, single-spaced, or with RookWorld's padding of moves and evals (the FEN's is the caller's)."""
    if padded:
        return f"M: {' '.join(moves):30}E: {' '.join(evals):40}B: {best}"
    return f" M: {' '.join(moves)} E: {' '.join(evals)} B: {best}"


def format_row(fen: str, moves: list[str], evals: list[str], best: str, padded: bool = False) -> str:
    """Write a whole row: prompt and completion."""
    return (f"{PREFIX}{fen:90}" if padded else prompt(fen)) + format_completion(moves, evals, best, padded)


def win_chance(centipawns: float) -> float:
    """Chance to win, in [0, 1], of a value in centipawns (Lichess: 1 / (1 + exp(-0.00368208 cp))); mates certain."""
    if abs(centipawns) >= MATE_CP:
        return 1.0 if centipawns > 0 else 0.0
    return 1.0 / (1.0 + math.exp(-_CHANCE_SLOPE * centipawns))


def value_of_chance(chance: float) -> float:
    """The inverse of `win_chance`, in centipawns, for chances strictly between 0 and 1."""
    return math.log(chance / (1.0 - chance)) / _CHANCE_SLOPE
