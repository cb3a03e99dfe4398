"""Trivial players on the items that a model is measured on: what a number is worth shows beside theirs.

They are computed from the items themselves, exactly: the random mover's results are averages over all legal moves. What
is counted over the items alone whose move is legal, as skill is, is counted over the same ones for them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import chess

from rookworld_trl.chess import TaskName, environment, policy
from rookworld_trl.chess.material import material_won
from rookworld_trl.chess.rewards import score_environment
from rookworld_trl.chess.rewards.moves import NOTHING_AT_STAKE, move_values
from rookworld_trl.measuring.intervals import ratios
from rookworld_trl.measuring.metrics import METRICS, Scores, terms

# Names as in an item's scores, and as in tables.
PLAYERS: dict[TaskName, dict[str, str]] = {
    "policy": {"random": "random legal", "first": "first legal", "material": "most material"},
    "environment": {"copy": "input copied"},
}
# What of their scores is kept, and the metrics that follow from it.
_FIELDS: dict[TaskName, tuple[str, ...]] = {
    "policy": ("best_value", "best_in_top5", "top1"),
    "environment": ("exact", "fen_exact", "first_four", "placement_exact", "reward_exact"),
}
_METRICS: dict[TaskName, tuple[str, ...]] = {
    "policy": ("best_legal", "skill", "legal_value", *_FIELDS["policy"]),
    "environment": _FIELDS["environment"],
}
# Over the items on which the model's move is legal, the players' too.
_OF_LEGAL_ITEMS = ("skill", "legal_value")
# What most moves lead to: the game goes on.
_NOTHING_HAPPENED = "+0.001+0+0"

Baselines = dict[str, dict[str, float]]  # by metric, by player as in tables


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
    return scores | {"at_stake": float(policy.win_chance(ranked[0]) - policy.win_chance(ranked[-1]) > NOTHING_AT_STAKE)}


def most_material(fen: str, legal_moves: Sequence[str]) -> str:
    """The legal move that wins most pawns' worth (1, 3, 3, 5, 9) in one ply; the alphabetically first of equals."""
    board = chess.Board(fen)
    return min(legal_moves, key=lambda uci: (-material_won(board, chess.Move.from_uci(uci)), uci))


def baselines(task: TaskName, scores: Sequence[Scores]) -> Baselines:
    """Every trivial player's value of the metrics that apply to it, over those of the items that the model's value of
    the metric is counted over."""
    found: Baselines = {}
    for metric in (metric for metric in METRICS[task] if metric.name in _METRICS[task]):
        found[metric.name] = {}
        for player, label in PLAYERS[task].items():
            values = ratios(*terms([_as_player(task, player, metric.name, s) for s in scores], [metric]))
            if not math.isnan(values[0]):  # no skill where no choice makes a difference, or no move is legal
                found[metric.name][label] = float(values[0])
    return found


def _as_player(task: TaskName, player: str, metric: str, scores: Scores) -> Scores:
    """An item's scores as if the player had answered, who moves legally wherever the metric counts."""
    own = {name: scores[f"{player}.{name}"] for name in _FIELDS[task]}
    legal = scores["best_legal"] if metric in _OF_LEGAL_ITEMS else 1.0
    return own if task == "environment" else {**scores, **own, "best_legal": legal}
