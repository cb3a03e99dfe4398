"""Rows of `jrahn/rookworld_7m` (one column, `text`) as checked prompts and targets; what is wrong with them is counted.

Three faults of the public rows are handled here, each measured on the public validation rows:

* `B:` of Black's rows is the worst of the five moves: its evals are relative to the mover already, and the generator
  took the last one for Black. Trained on as it stands it teaches Black to lose; see `best_move`.
* `A:` rows were labelled with `board.push()`, which checks no legality: some illegal moves carry a normal next state;
  see `illegal`.
* `A:` rows come without their prefix, although RookWorld-LM was trained with it in front of them.

A row that is malformed is left out and counted under its reason: one bad row in seven million ends no run, and a
thousand of them do not pass unseen.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import chess

from rookworld_trl.chess import PREFIXES, ParseError, environment, policy, split_row
from rookworld_trl.chess.dataset import row_of
from rookworld_trl.chess.engine import MATE_CENTIPAWNS
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.strata import phase, stratum

BestMove = Literal["evals", "engine"]
Illegal = Literal["keep", "fix", "drop"]

TEXT_COLUMN = "text"
# A row's five moves are the engine's best five; how much worse the others are it does not say. A pawn below the fifth
# is taken, and five points of win chance at least: less would pay a move outside of the five like one of them.
UNLISTED_LOSS_CP = 100
UNLISTED_LOSS = 0.05
_MATE_PAWNS_FROM = policy.MATE_CP / 100


class RowError(ValueError):
    """A row that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason: str, value: str):
        self.reason, self.value = reason, value[:160]
        super().__init__(f"{reason}: {self.value!r}")


@dataclass
class Report:
    """What became of the rows of a source.

    Attributes:
        read: rows seen.
        kept: rows that became prompts, by task.
        malformed: rows left out, by reason; `examples` holds number and text of the first row of each reason.
        best_repaired: `P:` rows whose `B:` was replaced by a better move of the row.
        illegal: `A:` rows with an illegal move, however labelled.
        mislabelled: those of them whose answer is not that of an illegal move; `illegal` says what becomes of them.
        dropped: those that were dropped for it.
        corrected: `A:` rows with a legal move whose answer was not python-chess's, which replaced it.
    """

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    malformed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    best_repaired: int = 0
    illegal: int = 0
    mislabelled: int = 0
    dropped: int = 0
    corrected: int = 0

    def reject(self, error: RowError) -> None:
        self.malformed[error.reason] += 1
        self.examples.setdefault(error.reason, (self.read - 1, error.value))

    def __str__(self) -> str:
        lines = [
            f"{self.read} rows read: {self.kept['policy']} P: and {self.kept['environment']} A: kept, "
            f"{self.malformed.total()} malformed, {self.dropped} dropped",
            f"P: 'B:' replaced by a better move of the row in {self.best_repaired}",
            f"A: {self.illegal} illegal moves, {self.mislabelled} of them labelled as if legal; "
            f"{self.corrected} answers to legal moves corrected",
        ]
        for reason, count in self.malformed.most_common():
            number, text = self.examples[reason]
            lines.append(f"malformed, {reason}: {count} (first: row {number}, {text!r})")
        return "\n".join(lines)


def convert_rows(
    rows: Iterable[Mapping[str, Any]],
    report: Report,
    best_move: BestMove = "evals",
    illegal: Illegal = "fix",
) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the shipped data, one by one, so that a stream works like a list.

    `P:` prompts end with the FEN, `A:` prompts with the third `+`; `target` is the rest of the row as it stands, its
    padding included, with `B:` and `A:` answers repaired as the options say.

    Args:
        rows: with a column `text`.
        report: filled on the way.
        best_move: where `B:` and the values of moves come from. `evals`: the row's evals, `B:` is the best of them;
            moves that the row does not list count a pawn less than its worst, or 5 points of win chance if that is
            more. `engine`: rows come without values and with `B:` as given, for `chess.sources` to fill in.
        illegal: what becomes of an `A:` row whose move is illegal but labelled as if it were legal. `fix`: it gets
            the answer of an illegal move; `drop`: it is left out; `keep`: it stays as it is, wrong.
    """
    for row in rows:
        report.read += 1
        try:
            text = row[TEXT_COLUMN]
            if not isinstance(text, str):
                raise RowError("no text", repr(text))
            if text.startswith(PREFIXES["policy"]):
                converted: dict[str, Any] | None = _policy_row(text, best_move, report)
            else:
                converted = _environment_row(text, illegal, report)
        except RowError as error:
            report.reject(error)
            continue
        if converted is not None:
            report.kept[converted["task"]] += 1
            yield converted


def with_prefix(text: str) -> str:
    """A public row with its task's prefix, which those of `A:` leave out."""
    return text if text.startswith(tuple(PREFIXES.values())) else environment.PREFIX + text


def centipawns(pawns: float) -> int:
    """A written eval as centipawns; a mate, written as about +-1000 pawns, as +-(10000 - n)."""
    if abs(pawns) < _MATE_PAWNS_FROM:
        return round(100 * pawns)
    distance = max(0, min(999, round(100 * (policy.MATE_PAWNS - abs(pawns)))))
    return (MATE_CENTIPAWNS - distance) * (1 if pawns > 0 else -1)


def values_of_all_moves(board: chess.Board, listed: Mapping[str, int]) -> dict[str, int]:
    """Centipawns of every legal move in UCI order: those listed, and the others some way below the worst."""
    worst = min(listed.values())
    chance = policy.win_chance(worst) - UNLISTED_LOSS
    lower = policy.value_of_chance(chance) if chance > 0 else -MATE_CENTIPAWNS
    floor = max(-MATE_CENTIPAWNS, min(worst - UNLISTED_LOSS_CP, math.floor(lower)))
    return {move: listed.get(move, floor) for move in sorted(legal.uci() for legal in board.legal_moves)}


def _policy_row(text: str, best_move: BestMove, report: Report) -> dict[str, Any]:
    try:
        prompt, completion = split_row(text)
        board = board_from_fen(policy.parse_prompt(prompt))
        output = policy.parse(completion.rstrip())
    except ParseError as error:
        raise RowError(f"P: {error.field}", text) from error
    legal = {move.uci() for move in board.legal_moves}
    if not set(output.moves) <= legal:
        raise RowError("P: illegal candidate", text)
    if len(set(output.moves)) != len(output.moves):
        raise RowError("P: repeated candidate", text)
    if len(output.evals) != len(output.moves):
        raise RowError("P: not one eval a move", text)
    listed = dict(zip(output.moves, map(centipawns, output.evals), strict=True))
    values = values_of_all_moves(board, listed) if best_move != "engine" else {}
    best = output.best
    if best_move == "evals" and (best not in listed or values[best] < max(listed.values())):
        best = max(output.moves, key=values.__getitem__)  # the first of equals, as the row has them
        report.best_repaired += 1
    target = policy.with_best(completion, best)
    return row_of("policy", prompt, target, phase(board), list(values), list(values.values()))


def _environment_row(text: str, illegal: Illegal, report: Report) -> dict[str, Any] | None:
    try:
        prompt, completion = split_row(with_prefix(text))
        given = environment.parse_prompt(prompt)
        board = board_from_fen(given.fen)
        labelled = environment.parse(completion.rstrip())
    except ParseError as error:
        raise RowError(f"A: {error.field}", text) from error
    truth = environment.transition(given.fen, given.move)
    target = environment.format_completion(truth)
    if truth.truncated:
        report.illegal += 1
        if (labelled.reward, labelled.truncated) != (truth.reward, truth.truncated):
            report.mislabelled += 1
            if illegal == "drop":
                report.dropped += 1
                return None
            if illegal == "keep":
                target = completion.rstrip()
    elif labelled != truth:
        report.corrected += 1
    return row_of("environment", prompt, target, stratum(board, given.move))
