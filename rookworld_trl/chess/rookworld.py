"""Rows of `jrahn/rookworld_7m` (one column, `text`) as checked prompts and targets; what is wrong with them is counted.

Three faults of the public rows are handled, each measured on the public validation rows:

* `B:` of Black's rows is the worst of the five moves: its evals are relative to the mover already, and the generator
  took the last one for Black. Trained on as it stands it teaches Black to lose; where engines value
  the moves they replace it.
* `A:` rows were labelled with `board.push()`, which checks no legality: some illegal moves carry a normal next state.
  Here every answer is python-chess's.
* `A:` rows come without their prefix, although RookWorld-LM was trained with it in front of them.

A row that is malformed is left out and counted under its reason: one bad row in seven million ends no run, and a
thousand of them do not pass unseen.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rookworld_trl.chess import PREFIXES, ParseError, environment, policy, split_row
from rookworld_trl.chess.dataset import row_of
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.strata import phase, stratum

TEXT_COLUMN = "text"


class RowError(ValueError):
    """A row that cannot be used, and why."""


@dataclass
class Report:
    """What became of the rows of a source.

    Attributes:
        read: rows seen.
        kept: rows that became prompts, by task.
        malformed: rows left out, by reason; `examples` holds number and text of the first row of each reason.
        illegal: `A:` rows with an illegal move, however labelled.
        mislabelled: those of them whose answer was not that of an illegal move, and is now.
        corrected: `A:` rows with a legal move whose answer was not python-chess's, and is now.
    """

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    malformed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    illegal: int = 0
    mislabelled: int = 0
    corrected: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.read} rows read: {self.kept['policy']} P: and {self.kept['environment']} A: kept, "
            f"{self.malformed.total()} malformed",
            f"A: {self.illegal} illegal moves, {self.mislabelled} of them labelled as if legal; "
            f"{self.corrected} answers to legal moves corrected",
        ]
        for reason, count in self.malformed.most_common():
            number, text = self.examples[reason]
            lines.append(f"malformed, {reason}: {count} (first: row {number}, {text!r})")
        return "\n".join(lines)


def convert_rows(rows: Iterable[Mapping[str, Any]], report: Report) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the shipped data, one by one, so that a stream works like a list.

    `P:` prompts end with the FEN, `A:` prompts with the third `+`; `target` is the rest of the row, of `P:` as it
    stands, its padding included. `P:` rows have no values of moves yet.

    Args:
        rows: with a column `text`.
        report: filled on the way.
    """
    for row in rows:
        report.read += 1
        text = row[TEXT_COLUMN]
        try:
            if not isinstance(text, str):
                raise RowError("no text")
            converted = _policy_row(text) if text.startswith(PREFIXES["policy"]) else _environment_row(text, report)
        except RowError as error:
            report.malformed[str(error)] += 1
            report.examples.setdefault(str(error), (report.read - 1, str(text)[:160]))
            continue
        report.kept[converted["task"]] += 1
        yield converted


def with_prefix(text: str) -> str:
    """A public row with its task's prefix, which those of `A:` leave out."""
    return text if text.startswith(tuple(PREFIXES.values())) else environment.PREFIX + text


def _policy_row(text: str) -> dict[str, Any]:
    try:
        prompt, completion = split_row(text)
        board = board_from_fen(policy.parse_prompt(prompt))
        output = policy.parse(completion.rstrip())
    except ParseError as error:
        raise RowError(f"P: {error.field}") from error
    if not set(output.moves) <= {move.uci() for move in board.legal_moves}:
        raise RowError("P: illegal candidate")
    if len(set(output.moves)) != len(output.moves):
        raise RowError("P: repeated candidate")
    if len(output.evals) != len(output.moves):
        raise RowError("P: not one eval a move")
    return row_of("policy", prompt, policy.with_best(completion, output.best), phase(board))


def _environment_row(text: str, report: Report) -> dict[str, Any]:
    try:
        prompt, completion = split_row(with_prefix(text))
        given = environment.parse_prompt(prompt)
        board = board_from_fen(given.fen)
        labelled = environment.parse(completion.rstrip())
    except ParseError as error:
        raise RowError(f"A: {error.field}") from error
    truth = environment.transition(given.fen, given.move)
    if truth.truncated:
        report.illegal += 1
        report.mislabelled += (labelled.reward, labelled.truncated) != (truth.reward, truth.truncated)
    else:
        report.corrected += labelled != truth
    return row_of("environment", prompt, environment.format_completion(truth), stratum(board, given.move))
