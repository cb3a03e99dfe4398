"""What each legal move of a `P:` row is worth against the best one: the scale on which skill is measured."""

from collections.abc import Sequence

from rookworld_trl.chess import policy
from rookworld_trl.chess.rewards.policy import PolicyScore

NOTHING_AT_STAKE = 0.01  # points of win chance between the best and the worst move, and no more


def move_values(legal_cp: Sequence[int]) -> list[float]:
    """Each move's value in [0, 1], 1 minus the win chance it gives away: `PolicyScore.best_value` if it were chosen."""
    chances = [policy.win_chance(cp) for cp in legal_cp]
    best = max(chances)
    return [1.0 - (best - chance) for chance in chances]


def random_value(legal_cp: Sequence[int]) -> float:
    """The expected value of a uniformly random legal move."""
    return sum(move_values(legal_cp)) / len(legal_cp)


def skill(scores: Sequence[PolicyScore | None], legal_cp: Sequence[Sequence[int]]) -> float | None:
    """Chance-corrected value of the chosen moves, over the answers whose move is legal.

    (mean value - r) / (1 - r), with r the mean value of a random legal move in the same positions, as Cohen's kappa
    corrects agreement: a random legal mover has 0, the best moves 1, worse than random is below 0.

    Returns:
        None where no answer is legal, or where no choice makes a difference.
    """
    pairs = [
        (score.best_value, random_value(values))
        for score, values in zip(scores, legal_cp, strict=True)
        if score is not None and score.best_legal
    ]
    possible = sum(1.0 - chance for _, chance in pairs)
    return sum(value - chance for value, chance in pairs) / possible if possible > 0 else None
