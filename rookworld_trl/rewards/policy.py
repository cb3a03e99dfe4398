"""Score of a `P:` completion against stored engine values: per-field results, a graduated and a continuous reward.

No engine and no python-chess run here: legality and the value of every legal move come with the row. Values are
compared as win chances, in which a lost pawn weighs most where the game is open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rookworld_trl.rewards.levels import LEVELS, UNPARSABLE, VALID
from rookworld_trl.tasks import policy
from rookworld_trl.tasks.formats import ParseError

_SMALL_LOSS = 0.03  # three points of win chance
_TINY_LOSS = 0.01

# Continuous form of a valid list: 0.2 for being valid, the rest split so that B, the move that gets played, rules.
_BEST_SHARE = 0.7
_CANDIDATES_SHARE = 0.15
_EVALS_SHARE = 0.15
_SHARPNESS = 3  # qualities are win-chance values to this power: 0.5 -> 0.125, 0.9 -> 0.73

# Evals in a flat position differ by less than their rounding; an error of this size (a fifth of a pawn) is the
# least that the constant predictor is taken to make, so that a right flat list isn't judged on noise.
_LEAST_CONSTANT_ERROR = 0.02


@dataclass(frozen=True, slots=True)
class PolicyScore:
    """What is right in one `P:` completion. An unparsable one has every field at its worst.

    Attributes:
        parsed: the whole completion follows the format.
        best_legal: `B:` is a legal move.
        best_value: 1 - best_loss; 0 if `B:` is illegal. The headline metric.
        best_loss: win chance of the best legal move minus that of `B:`, in [0, 1]; 1 if `B:` is illegal.
        n_candidates: number of moves in `M:`.
        candidates_legal_distinct: `M:` holds exactly min(5, number of legal moves) moves, all legal, none twice.
        best_in_moves: `B:` is one of `M:`.
        best_in_top5: `B:` is worth as much as the fifth best legal move, or more (any of them, below five).
        top1: `B:` is worth as much as the best legal move.
        evals_score: 1 - error / error of the best constant, in win chance over the candidates, cut at 0;
            0 for constant evals where the true ones differ, and where the list of moves isn't valid.
        level: index into `LEVELS`, 0 (unparsable) to 5 (best move).
        reward: the graduated reward, `LEVELS[level]`.
        continuous: the continuous reward, in [-0.3, 1].
    """

    parsed: bool
    best_legal: bool
    best_value: float
    best_loss: float
    n_candidates: int
    candidates_legal_distinct: bool
    best_in_moves: bool
    best_in_top5: bool
    top1: bool
    evals_score: float
    level: int
    reward: float
    continuous: float


_UNPARSABLE_SCORE = PolicyScore(
    parsed=False,
    best_legal=False,
    best_value=0.0,
    best_loss=1.0,
    n_candidates=0,
    candidates_legal_distinct=False,
    best_in_moves=False,
    best_in_top5=False,
    top1=False,
    evals_score=0.0,
    level=0,
    reward=UNPARSABLE,
    continuous=UNPARSABLE,
)


def score_policy(completion: str, legal_moves: Sequence[str], legal_cp: Sequence[int]) -> PolicyScore:
    """Score a completion of a `P:` prompt. Never raises on the completion, whatever it holds.

    Levels: unparsable; well-formed but not valid; valid; `B:` among the five best; `B:` loses at most 3 points of
    win chance; at most 1 point, or a best move. Valid means: the right number of legal, distinct candidates, one
    eval each, `B:` among them, and evals that differ where the true ones do (to the digits that are written).
    A worst move never counts as one of the five best, which matters where there are five legal moves or fewer.

    Continuous: a valid list earns 0.2 + 0.8 (0.7 b³ + 0.15 c³ + 0.15 e), with b the value of `B:`, c that of the
    candidates against the best ones, e the evals' score. One that isn't valid earns at most 0.2, by its share of
    legal, distinct candidates and the value of `B:`, so that a weak model has something to climb.

    Args:
        completion: the model's text without special tokens.
        legal_moves: every legal move in UCI.
        legal_cp: the engine's value of each in centipawns from the mover's side; mates are +-(10000 - plies).

    Raises:
        ValueError: no legal moves, or not one finite value for each; that is an error in the data.
    """
    if not legal_moves or len(legal_moves) != len(legal_cp):
        raise ValueError(
            f"field 'legal_cp': {len(legal_cp)} values for {len(legal_moves)} legal moves; "
            "a policy row needs at least one legal move and one value for each"
        )
    if not math.isfinite(sum(legal_cp)):  # a NaN would pass every comparison below and come out as a reward
        raise ValueError(f"field 'legal_cp': {legal_cp} holds NaN or Inf; write centipawns")
    try:
        parsed = policy.parse(completion)
    except ParseError:
        return _UNPARSABLE_SCORE
    values = dict(zip(legal_moves, legal_cp, strict=True))
    ranked = sorted(legal_cp, reverse=True)
    moves, best_cp = parsed.moves, values.get(parsed.best)

    expected = min(policy.MAX_CANDIDATES, len(legal_moves))
    good = {move for move in moves if move in values}
    complete = len(moves) == len(good) == expected
    in_moves = parsed.best in moves
    loss = 1.0 if best_cp is None else policy.win_chance(ranked[0]) - policy.win_chance(best_cp)
    top1 = best_cp == ranked[0]
    top5 = best_cp is not None and best_cp >= ranked[expected - 1]

    evals_score, constant = 0.0, False
    if complete and len(parsed.evals) == expected:
        evals_score, constant = _score_evals(parsed.evals, [values[move] for move in moves])

    if not (complete and len(parsed.evals) == expected and in_moves) or constant:
        level = 1
        legal_share = len(good) / max(expected, len(moves))
        continuous = VALID * (0.25 * legal_share + 0.75 * (1.0 - loss))
    else:
        assert best_cp is not None  # it is one of the candidates, and they are all legal
        if top1 or loss <= _TINY_LOSS:
            level = 5
        elif loss <= _SMALL_LOSS:
            level = 4
        else:
            level = 3 if top5 and best_cp > ranked[-1] else 2
        shortfall = sum(map(policy.win_chance, ranked[:expected])) - sum(
            policy.win_chance(values[move]) for move in moves
        )
        continuous = VALID + (1.0 - VALID) * (
            _BEST_SHARE * (1.0 - loss) ** _SHARPNESS
            + _CANDIDATES_SHARE * (1.0 - max(shortfall, 0.0) / expected) ** _SHARPNESS
            + _EVALS_SHARE * evals_score
        )
    return PolicyScore(
        parsed=True,
        best_legal=best_cp is not None,
        best_value=1.0 - loss,
        best_loss=loss,
        n_candidates=len(moves),
        candidates_legal_distinct=complete,
        best_in_moves=in_moves,
        best_in_top5=top5,
        top1=top1,
        evals_score=evals_score,
        level=level,
        reward=LEVELS[level],
        continuous=min(continuous, 1.0),
    )


def _score_evals(evals: Sequence[float], true_cp: Sequence[int]) -> tuple[float, bool]:
    """Evals' score in [0, 1], and whether they are constant although the true ones, as written, are not."""
    true_pawns = [float(policy.format_eval(cp)) for cp in true_cp]  # to the digits that are written
    if len(set(evals)) == 1 and len(set(true_pawns)) > 1:
        return 0.0, True
    truth = [policy.win_chance(100.0 * pawns) for pawns in true_pawns]
    error = sum(abs(policy.win_chance(100.0 * guess) - chance) for guess, chance in zip(evals, truth, strict=True))
    median = sorted(truth)[len(truth) // 2]  # the constant with the least absolute error
    constant_error = max(sum(abs(median - chance) for chance in truth), _LEAST_CONSTANT_ERROR * len(truth))
    return max(0.0, 1.0 - error / constant_error), False
