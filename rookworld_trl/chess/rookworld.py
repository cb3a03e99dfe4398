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

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rookworld_trl.chess import PREFIXES, ParseError, environment, policy, split_row, task_of
from rookworld_trl.chess.dataset import Report, row_of
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.strata import phase, stratum

TEXT_COLUMN = "text"


def convert_rows(rows: Iterable[Mapping[str, Any]], report: Report) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the shipped data, one by one, so that a stream works like a list.

    `P:` prompts end with the FEN, `A:` prompts with the third `+`; `target` is the rest of the row, of `P:` as it
    stands, its padding included. `P:` rows have no values of moves yet.

    Args:
        rows: with a column `text`.
        report: filled on the way.
    """
    for number, row in enumerate(rows):
        report.count("rows read")
        text = with_prefix(str(row[TEXT_COLUMN]))
        task = task_of(text)
        try:
            converted = _policy_row(text) if task == "policy" else _environment_row(text, report)
        except ParseError as error:
            report.count(f"malformed, {PREFIXES[task]}{error.field}", f"row {number}, {text[:160]!r}")
            continue
        report.count(f"{PREFIXES[task]}rows kept")
        yield converted


def with_prefix(text: str) -> str:
    """A public row with its task's prefix, which those of `A:` leave out."""
    return text if text.startswith(tuple(PREFIXES.values())) else environment.PREFIX + text


def _policy_row(text: str) -> dict[str, Any]:
    prompt, completion = split_row(text)
    board = board_from_fen(policy.parse_prompt(prompt))
    output = policy.parse(completion.rstrip())
    listed = set(output.moves)
    if len(listed) != len(output.moves) or not listed <= {move.uci() for move in board.legal_moves}:
        raise ParseError("candidates", text, "list legal moves, each once")
    if len(output.evals) != len(output.moves):
        raise ParseError("evals", text, "write one eval a move")
    return row_of("policy", prompt, policy.with_best(completion, output.best), phase(board))


def _environment_row(text: str, report: Report) -> dict[str, Any]:
    prompt, completion = split_row(text)
    given = environment.parse_prompt(prompt)
    board = board_from_fen(given.fen)
    labelled = environment.parse(completion.rstrip())
    truth = environment.transition(given.fen, given.move)
    if truth.truncated:
        report.count("A: rows of illegal moves")
        if (labelled.reward, labelled.truncated) != (truth.reward, truth.truncated):
            report.count("A: rows of illegal moves labelled as if they were legal, and corrected")
    elif labelled != truth:
        report.count("A: rows of legal moves corrected")
    return row_of("environment", prompt, environment.format_completion(truth), stratum(board, given.move))
