"""Score of a `P:` completion against stored engine values: per-field results, a graduated and a continuous reward.

No engine and no python-chess run here: legality and the value of every legal move come with the row. Values are
compared as win chances, in which a lost pawn weighs most where the game is open.

What each level certifies:

0. nothing: the text does not parse.
1. the format. It pays up to 0.2, so that a weak model has something to climb: a quarter of that for legal, distinct
   candidates, a quarter for the value of `B:`, as much again in a valid list, a quarter for evals on their way to the
   margin. A valid list of good moves with uninformative evals stays at 0.15 or below: that leaves room for the luck of
   guesses, so that a text written without knowledge of the values earns at most 0.2 in the mean over positions.
2. the rules and the values of the candidates: a valid list whose evals beat the best constant by a margin.
3. besides, `B:` is one of the five best. 4, 5: it loses at most three points, at most one point, of win chance.

Evals are measured against the constant that errs least on the same moves, which takes the true values to find. So
constants, and constants with a digit changed, earn nothing, wherever they lie; ramps and noise must meet both the
level and the differences of this position. Two corrections: a list made wide by blunders, whose values are easy to
tell apart, is measured by the spread of the best five moves; and where all true evals are equal, which leaves nothing
to tell apart, the level must be right to two points. These rows are the ones that a fixed text wins: one in twenty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rookworld_trl.chess import policy
from rookworld_trl.chess.format import ParseError
from rookworld_trl.chess.rewards.levels import LEVELS, UNPARSABLE, VALID

_SMALL_LOSS = 0.03  # three points of win chance
_TINY_LOSS = 0.01

# Continuous form above level 1, behind evals that beat the constant: B, the move that gets played, rules.
_BEST_SHARE = 0.7
_CANDIDATES_SHARE = 0.15
_EVALS_SHARE = 0.15
_SHARPNESS = 3  # qualities are win-chance values to this power: 0.5 -> 0.125, 0.9 -> 0.73

_EVALS_MARGIN = 0.2  # share of the best constant's error that evals must save to count as informative
_FLAT_ERROR = 0.02  # mean error in win chance, a fifth of a pawn, from which evals of equal moves score 0


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
        evals_score: 1 - error / error of the best constant, in win chance over the candidates, cut at 0 (for equal
            candidates and wide lists see above); 0 where the list of moves isn't valid.
        level: index into `LEVELS`, 0 (unparsable) to 5 (best move).
        reward: the graduated reward, `LEVELS[level]`; up to that on level 1.
        continuous: the continuous reward, in [-0.3, 1].
    """

    parsed: bool = False
    best_legal: bool = False
    best_value: float = 0.0
    best_loss: float = 1.0
    n_candidates: int = 0
    candidates_legal_distinct: bool = False
    best_in_moves: bool = False
    best_in_top5: bool = False
    top1: bool = False
    evals_score: float = 0.0
    level: int = 0
    reward: float = UNPARSABLE
    continuous: float = UNPARSABLE


def score_policy(completion: str, legal_moves: Sequence[str], legal_cp: Sequence[int]) -> PolicyScore:
    """Score a completion of a `P:` prompt. Never raises on the completion, whatever it holds.

    Levels: unparsable; well-formed; valid with informative evals; besides, `B:` among the five best; loses at most 3
    points of win chance; at most 1 point, or is a best move. Valid means: the right number of legal, distinct
    candidates, one eval each, `B:` among them. Informative means: `evals_score` is at least 0.2. A worst move never
    counts as one of the five best, which matters where there are five legal moves or fewer.

    With v = 1 for a valid list, b the value of `B:`, l the share of legal, distinct candidates, e the evals' score and
    g = min(1, e / 0.2), level 1 pays 0.2 s, s = (l + b³ + v b³ + v g) / 4. The continuous form is
    0.2 s + 0.8 v g (0.7 b³ + 0.15 c³ + 0.15 e), with c the value of the candidates against the best ones.

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
        return PolicyScore()
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

    valid = complete and len(parsed.evals) == expected and in_moves
    evals_score = 0.0
    if complete and len(parsed.evals) == expected:
        evals_score = _score_evals(parsed.evals, [values[move] for move in moves], ranked[:expected])
    unlocked = min(1.0, evals_score / _EVALS_MARGIN) if valid else 0.0

    quality = (1.0 - loss) ** _SHARPNESS
    legal_share = len(good) / max(expected, len(moves))
    base = VALID * (legal_share + quality * (1 + valid) + unlocked) / 4
    if unlocked < 1.0:
        level = 1
    elif top1 or loss <= _TINY_LOSS:
        level = 5
    elif loss <= _SMALL_LOSS:
        level = 4
    else:
        level = 3 if top5 and best_cp != ranked[-1] else 2
    continuous = base
    if unlocked:
        shortfall = sum(map(policy.win_chance, ranked[:expected])) - sum(
            policy.win_chance(values[move]) for move in moves
        )
        continuous += (
            (1.0 - VALID)
            * unlocked
            * (
                _BEST_SHARE * quality
                + _CANDIDATES_SHARE * (1.0 - max(shortfall, 0.0) / expected) ** _SHARPNESS
                + _EVALS_SHARE * evals_score
            )
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
        reward=LEVELS[level] if level > 1 else base,
        continuous=min(continuous, 1.0),
    )


def _score_evals(evals: Sequence[float], true_cp: Sequence[int], best_cp: Sequence[int]) -> float:
    """Evals' score in [0, 1]. Values as rows write them, as they are, and to a tenth of a pawn are all the truth."""
    guesses = [policy.win_chance(100.0 * pawns) for pawns in evals]
    best = 0.0
    for truth in (_written_chance, policy.win_chance, _rounded_chance):
        best = max(best, _above_constant(guesses, true_cp, best_cp, truth))
        if best == 1.0:
            break
    return best


def _written_chance(centipawns: int) -> float:
    return policy.win_chance(100.0 * float(policy.format_eval(centipawns)))


def _rounded_chance(centipawns: int) -> float:
    """Win chance of a value to a tenth of a pawn, from 10 pawns on to a whole one: nobody has to know centipawns."""
    if abs(centipawns) < 995:
        return policy.win_chance(100.0 * round(centipawns / 100, 1))
    mate = abs(centipawns) >= policy.MATE_CP
    return policy.win_chance(centipawns if mate else 100.0 * max(-30, min(30, round(centipawns / 100))))


def _above_constant(
    guesses: Sequence[float], true_cp: Sequence[int], best_cp: Sequence[int], chance: Callable[[int], float]
) -> float:
    """1 - mean error / mean error of the best constant, cut at 0."""
    truth = list(map(chance, true_cp))
    error = sum(map(abs, map(float.__sub__, guesses, truth))) / len(truth)
    allowed = _deviation(truth)
    if allowed == 0.0:
        allowed = _FLAT_ERROR
    elif allowed > _FLAT_ERROR:  # blunders in the list make it easier only so far
        allowed = min(allowed, max(_FLAT_ERROR, _deviation(list(map(chance, best_cp)))))
    return max(0.0, 1.0 - error / allowed)


def _deviation(chances: Sequence[float]) -> float:
    """Mean absolute deviation from the median, which is the constant that errs least."""
    median = sorted(chances)[len(chances) // 2]
    return sum(abs(median - chance) for chance in chances) / len(chances)
