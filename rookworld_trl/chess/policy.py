"""The policy task `P:`: a position in, candidate moves, their evals and the best move out.

    P: <FEN> M: <up to 5 UCI moves> E: <one eval each> B: <best move>

Evals are in pawns from the mover's side; mates stand as about +-1000. RookWorld pads its fields with spaces
(`P: {fen:90}M: {moves:30}E: {evals:40}B: {best}`); both that text and the single-spaced one parse. Spaces beyond a
field's width, or behind the best move, belong to neither. Commas in place of the spaces inside a list are read, too,
and so is one end of a line behind the best move: RookWorld's generator wrote a line a row.

What has several spellings is written and recognised by `Spelling` alone: data, decision points and probe ask it.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rookworld_trl.chess.format import FEN_PATTERN, MOVE_PATTERN, ParseError

PREFIX = "P: "
MAX_CANDIDATES = 5
MATE_PAWNS = 1000.0
MATE_CP = 9000  # an engine value from here on is a mate: +-(10000 - moves to mate)

# Widths of the fields in front of RookWorld's sections. A FEN has 25 characters or more.
_WIDTHS = {"M": 90, "E": 30, "B": 40}
MOST_SPACES = _WIDTHS["M"] - 25  # in front of a section's name

_EVAL = r"[+-]?[0-9]{1,4}(?:\.[0-9]{1,4})?"
_PROMPT = re.compile(f"{PREFIX}({FEN_PATTERN})")
# Sections in order, anything but a section letter inside: says which section is missing before its content is read.
_SECTIONS = re.compile(rf" {{0,{MOST_SPACES}}}M:(?P<moves>[^MEB:]*)E:(?P<evals>[^MEB:]*)B:(?P<best>[^MEB:]*)")
_MOVES, _EVALS = (re.compile(f" {each}(?:(?: {each})*|(?:,{each})*) *") for each in (MOVE_PATTERN, _EVAL))
_BEST = re.compile(f" ({MOVE_PATTERN})\n?")

_PADDED = re.compile("^  |  [MEB]:")
_SINGLE = re.compile(" ?M:")
_DECIMALS = re.compile(r" -?[0-9]\.([0-9]+)(?= )")  # of an eval below 10 pawns that something follows
_NEEDLESS = re.compile(r"\.[0-9]0(?![0-9])")  # a second decimal that is 0


@dataclass(frozen=True, slots=True)
class Spelling:
    """How `P:` completions are laid out, where several ways are right. A policy writes one; nothing may pull it away.

    Attributes:
        padded: spaces fill FEN, moves and evals up to RookWorld's widths; otherwise one space is between two fields.
        decimals: of evals, as `format_eval` takes them.
        end: what stands behind the best move: nothing, or the end of a line.
    """

    padded: bool = False
    decimals: int | None = 2
    end: str = ""

    def section(self, name: str, width: int) -> str:
        """The name of a section, "M", "E" or "B", and the spaces between it and the `width` characters of the field
        in front of it: for "M" what the prompt says behind `P: `, else a list without the space that leads it."""
        least = int(name != "M")  # a list that is too long for its field is still read if one space ends it
        return " " * (max(least, _WIDTHS[name] - width) if self.padded else 1) + f"{name}:"


SINGLE, PADDED = Spelling(), Spelling(padded=True, decimals=None)
SPELLINGS = {"single": SINGLE, "padded": PADDED}


def spelling_of(completion: str) -> Spelling | None:
    """How a completion, or the beginning of one, is spelled; None where that cannot be seen.

    Evals of single-spaced rows have two decimals if most of those below 10 pawns have, else one. Padded ones have as
    many as they need, as RookWorld's, unless one ends in a 0 that it does not need.
    """
    padded = _PADDED.search(completion) is not None
    if not padded and _SINGLE.match(completion) is None:
        return None
    written = _DECIMALS.findall(completion)
    two = sum(len(digits) >= 2 for digits in written)
    decimals: int | None = 2 if 2 * two > len(written) else 1
    if padded:
        decimals = None if _NEEDLESS.search(completion) is None else 2
    return Spelling(padded, decimals, "\n" if "\n" in completion else "")


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

    A list is separated by single spaces or by commas throughout; one end of a line may follow the best move.

    Raises:
        ParseError: naming the section that is wrong.
    """
    sections = _SECTIONS.fullmatch(completion)
    if sections is None:
        raise ParseError("sections", completion, "write 'M: <moves> E: <evals> B: <move>' and nothing else")
    moves, evals, best = sections["moves"], sections["evals"], sections["best"]
    if _MOVES.fullmatch(moves) is None or not _well_spaced(moves, _WIDTHS["E"]):
        raise ParseError("moves", moves, "write UCI moves with one space between them")
    if _EVALS.fullmatch(evals) is None or not _well_spaced(evals, _WIDTHS["B"]):
        raise ParseError("evals", evals, "write decimal numbers with one space between them")
    if (move := _BEST.fullmatch(best)) is None:
        raise ParseError("best", best, "write one UCI move and nothing behind it")
    listed, values = (text.replace(",", " ").split() for text in (moves, evals))
    return PolicyOutput(tuple(listed), tuple(map(float, values)), move[1])


def read(completion: str) -> PolicyOutput | None:
    """`parse`; None where the completion does not follow the format."""
    try:
        return parse(completion)
    except ParseError:
        return None


def _well_spaced(section: str, width: int) -> bool:
    """One space behind the content of a section, or more up to the field's width (a space leads it)."""
    return section.endswith(" ") and (len(section) <= 1 + width or not section.endswith("  "))


def format_eval(centipawns: int, decimals: int | None = 2) -> str:
    """Write an eval in pawns from the mover's side, so that moves of different values are told apart where it matters.

    Two decimals below 10 pawns (or one, to a tenth), whole pawns up to 30 and no further; a mate (`MATE_CP` or beyond)
    is +-1000.0. With `decimals` None as RookWorld's generator printed it: the shortest text of the value itself, up to
    two decimals, and +-(1000 - n / 100) for a mate in n moves.
    """
    mate = abs(centipawns) >= MATE_CP
    if decimals is None:
        return str((math.copysign(90_000 + abs(centipawns), centipawns) if mate else centipawns) / 100)
    if mate:
        return f"{math.copysign(MATE_PAWNS, centipawns):.1f}"
    pawns = centipawns / 100
    if abs(round(pawns, decimals)) < 10:
        return f"{round(pawns, decimals) + 0.0:.{decimals}f}"
    return f"{max(-30.0, min(30.0, float(round(pawns)))):.1f}"


def format_completion(
    moves: Sequence[str],
    evals: Sequence[str],
    best: str,
    spelling: Spelling = SINGLE,
    fen_width: int = _WIDTHS["M"],
) -> str:
    """Write a completion.

    Args:
        fen_width: characters behind the `P: ` of the prompt, which a padded completion fills up; default: none are
            missing.
    """
    texts = " ".join(moves), " ".join(evals)
    heads = [spelling.section(*each) for each in zip("MEB", (fen_width, *map(len, texts)), strict=True)]
    return f"{heads[0]} {texts[0]}{heads[1]} {texts[1]}{heads[2]} {best}{spelling.end}"


def with_best(completion: str, best: str) -> str:
    """A completion with another best move and otherwise as it is written; spaces behind the move go."""
    head, _, written = completion.rpartition("B: ")
    return f"{head}B: {best}" + "\n" * written.endswith("\n")


def policy_completion(moves: list[str], centipawns: list[int], rng: random.Random) -> str:
    """The gold `P:` completion from moves and their values: the five best in random order, as RookWorld's rows have
    them, so that neither a place in the list nor the alphabet tells the best one. Of equals the first listed is `B:`.
    """
    ranked = sorted(zip(moves, centipawns, strict=True), key=lambda pair: -pair[1])[:MAX_CANDIDATES]
    rng.shuffle(ranked)
    best = max(ranked, key=lambda pair: pair[1])[0]
    candidates, values = zip(*ranked, strict=True)
    return format_completion(list(candidates), [format_eval(cp) for cp in values], best)


def respelled(row: dict[str, Any], spelling: Spelling) -> dict[str, Any]:
    """A row of a data set, the answer of a `P:` row in another spelling: the same moves with the evals of their values.

    An answer that is in this spelling already stays as it is, and so does an empty one.
    """
    written = row["target"]
    if row["task"] != "policy" or not written or spelling_of(written) == spelling:
        return row
    answer, values = parse(written), dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
    evals = [format_eval(values[move], spelling.decimals) for move in answer.moves]
    width = len(row["prompt"]) - len(PREFIX)
    return {**row, "target": format_completion(answer.moves, evals, answer.best, spelling, width)}


def win_chance(centipawns: float) -> float:
    """Chance to win, in [0, 1], of a value in centipawns (Lichess: 1 / (1 + exp(-0.00368208 cp))); mates certain."""
    if abs(centipawns) >= MATE_CP:
        return 1.0 if centipawns > 0 else 0.0
    return 1.0 / (1.0 + math.exp(-0.00368208 * centipawns))
