"""Values of moves for `P:` rows that have none, from a pool of engines."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import chess

from rookworld_trl.chess import policy
from rookworld_trl.chess.answers import policy_completion
from rookworld_trl.chess.engine import EnginePool

CHUNK = 1024  # rows read ahead, so that every engine of the pool has something to do


@dataclass
class ValuesReport:
    """What the engines did: rows that got values, rows left out because a search failed, `B:` replaced by a better
    move of the row."""

    valued: int = 0
    failed: int = 0
    best_repaired: int = 0

    def __str__(self) -> str:
        return (
            f"engine: {self.valued} P: rows valued, 'B:' replaced in {self.best_repaired} of them; "
            f"{self.failed} left out because a search failed"
        )


def with_values(rows: Iterable[dict[str, Any]], pool: EnginePool, report: ValuesReport) -> Iterator[dict[str, Any]]:
    """The rows in their order, `P:` rows without values valued by the engines.

    Args:
        rows: in the schema of the shipped data; a `P:` row to be valued has no `legal_moves`. Its `target` may be empty
            (it becomes the gold completion) or a completion, whose `B:` becomes the best of its moves.
        pool: running.
        report: filled on the way.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        bare = [row for row in chunk if row["task"] == "policy" and not row["legal_moves"]]
        fens = [policy.parse_prompt(row["prompt"]) for row in bare]
        failed = set()
        for row, fen, values in zip(bare, fens, pool.values(fens), strict=True):
            if values is None or len(values) != chess.Board(fen).legal_moves.count():
                failed.add(id(row))
                continue
            by_move = {value.move: value.centipawns for value in sorted(values, key=lambda value: value.move)}
            row |= {"legal_moves": list(by_move), "legal_cp": list(by_move.values())}
            target = _target(row["target"], by_move, fen)
            report.best_repaired += bool(row["target"]) and target != row["target"]
            row["target"] = target
        report.valued += len(bare) - len(failed)
        report.failed += len(failed)
        yield from (row for row in chunk if id(row) not in failed)


def _target(written: str, values: dict[str, int], fen: str) -> str:
    if not written:
        return policy_completion(list(values), list(values.values()), random.Random(fen))
    output = policy.parse(written.rstrip())
    best = max(output.moves, key=values.__getitem__)  # the first of equals, as the row has them
    if output.best in output.moves and values[output.best] == values[best]:
        return written
    return policy.with_best(written, best)
