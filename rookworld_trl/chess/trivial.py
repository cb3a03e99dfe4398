"""Trivial players on the items that a model is measured on: what a number is worth shows beside theirs.

They are computed from the items themselves, exactly: the random mover's results are averages over all legal moves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import chess

from rookworld_trl.chess import TaskName, environment, policy
from rookworld_trl.chess.material import material_won
from rookworld_trl.chess.rewards import score_environment
from rookworld_trl.chess.rewards.moves import NOTHING_AT_STAKE, move_values

# Names as in an item's scores, and as in tables.
PLAYERS: dict[TaskName, dict[str, str]] = {
    "policy": {"random": "random legal", "first": "first legal", "material": "most material"},
    "environment": {"copy": "input copied"},
}
# What of their scores is kept.
_FIELDS: dict[TaskName, tuple[str, ...]] = {
    "policy": ("best_value", "best_in_top5", "top1"),
    "environment": ("exact", "fen_exact", "first_four", "placement_exact", "reward_exact"),
}
# What most moves lead to: the game goes on.
_NOTHING_HAPPENED = "+0.001+0+0"


def baseline_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The trivial players' scores on a row, as `player.field`; of a `P:` row also `at_stake`.

    The random mover, the alphabetically first legal move, and the move that wins most material at once (the captured
    man's value and what a promotion adds; the first of equals). Of an `A:` row the copied input, as if nothing had
    happened.
    """
    if row["task"] == "environment":
        copied = environment.parse_prompt(row["prompt"]).fen + _NOTHING_HAPPENED
        score = score_environment(row["prompt"], copied, row["target"])
        return {f"copy.{name}": float(getattr(score, name)) for name in _FIELDS["environment"]}
    moves, cp = row["legal_moves"], row["legal_cp"]
    ranked = sorted(cp, reverse=True)
    fifth = ranked[min(policy.MAX_CANDIDATES, len(cp)) - 1]
    fields = list(
        zip(move_values(cp), (float(value >= fifth) for value in cp), (float(v == ranked[0]) for v in cp), strict=True)
    )
    first = moves.index(min(moves))
    material = moves.index(most_material(policy.parse_prompt(row["prompt"]), moves))
    means = [sum(column) / len(column) for column in zip(*fields, strict=True)]
    found = {"random": means, "first": fields[first], "material": fields[material]}
    scores = {
        f"{player}.{name}": value
        for player, values in found.items()
        for name, value in zip(_FIELDS["policy"], values, strict=True)
    }
    scores |= {f"{player}.best_legal": 1.0 for player in found}
    return scores | {"at_stake": float(policy.win_chance(ranked[0]) - policy.win_chance(ranked[-1]) > NOTHING_AT_STAKE)}


def most_material(fen: str, legal_moves: Sequence[str]) -> str:
    """The legal move that wins most pawns' worth (1, 3, 3, 5, 9) in one ply; the alphabetically first of equals."""
    board = chess.Board(fen)
    return min(legal_moves, key=lambda uci: (-material_won(board, chess.Move.from_uci(uci)), uci))
