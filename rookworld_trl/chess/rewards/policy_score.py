"""Score of a `P:` completion against stored engine values: per-field results and one reward, continuous or in levels.

No engine and no python-chess run here: legality and the value of every legal move come with the row (`moves.Stakes`).
The reward is a sum of what each part of an answer is worth, each 0 for chance and 1 for the best that can be written:

    B:   what the move gains over a random legal move, beside what the best move gains
    M:   the same of all candidates together, beside the best list possible
    E:   half: by how much the evals err less than the best constant; half: the pairs of moves that they order rightly;
         both beside the best list's spread, so that no other list is easier

less the fines for broken rules. So a player earns most, in the mean, by writing the best moves that it knows, best move
included, with what it believes of them, however much its values are off; and a part that cannot be told from chance, in
a position where it makes no difference, hands its share to the others. The levels are cuts of this one number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rookworld_trl.chess import policy
from rookworld_trl.chess.format import ParseError
from rookworld_trl.chess.rewards.moves import (
    CANDIDATES_FINE,
    EVALS_FINE,
    ILLEGAL_FINE,
    LEVELS,
    UNLISTED_FINE,
    UNPARSABLE,
    VALID,
    Stakes,
    deviation,
    differences,
    random_value,
    squeezed,
    stakes_of,
)

CUTS = (0.4, 0.6, 0.8, 0.95)  # of the reward, from which levels 2 to 5 begin


@dataclass(frozen=True, slots=True)
class PolicyScore:
    """What is right in one `P:` completion. An unparsable one has every field at its worst.

    Attributes:
        parsed: the whole completion follows the format.
        best_legal: `B:` is a legal move.
        best_value: 1 - best_loss; 0 if `B:` is illegal.
        best_loss: win chance of the best legal move minus that of `B:`, in [0, 1]; 1 if `B:` is illegal.
        n_candidates: number of moves in `M:`.
        candidates_legal_distinct: `M:` holds exactly min(5, number of legal moves) moves, all legal, none twice.
        best_in_moves: `B:` is one of `M:`.
        best_in_top5: `B:` is worth as much as the fifth best legal move, or more (any of them, below five).
        top1: `B:` is worth as much as the best legal move.
        evals_score: of the evals, in [0, 1]: 0 for constants, 1 for the truth; 0 where the list isn't right.
        evals_ordered: of the differences in win chance between all pairs of listed moves, those that the evals order
            rightly less those that they turn round; 0 where the list isn't right.
        evals_apart: all of these differences.
        level: index into `LEVELS`, 0 (unparsable) to 5.
        reward: the graduated reward, `LEVELS[level]`; on level 1 the continuous one as far as it is below that.
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
    evals_ordered: float = 0.0
    evals_apart: float = 0.0
    level: int = 0
    reward: float = UNPARSABLE
    continuous: float = UNPARSABLE


def score_policy(completion: str, legal_moves: Sequence[str], legal_cp: Sequence[int]) -> PolicyScore:
    """Score a completion of a `P:` prompt. Never raises on the completion, whatever it holds.

    With g(m) what a move gains, m̄ a random legal move's mean, * the best and n the number of candidates, the continuous
    form is

        β (g(B) - g(m̄)) / (g* - g(m̄)) + λ (Σ g(M) / n - g(m̄)) / (Σ* g / n - g(m̄)) + ε e + (1 - β - λ - ε) - fines

    with shares β, λ, ε that follow what is at stake (`moves.stakes_of`); below 0 it is squeezed into [-0.25, 0). The
    graduated form is the level that it reaches: 0.4, 0.6 and 0.8 from there on, 1 from 0.95 on, and below 0.4 itself,
    0.2 at most.

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
    stakes, number = stakes_of(tuple(legal_cp)), {move: i for i, move in enumerate(legal_moves)}
    moves, evals, expected = parsed.moves, parsed.evals, stakes.expected
    good = [number[move] for move in dict.fromkeys(moves) if move in number][:expected]
    complete = len(moves) == len(good) == expected
    evals_score, ordered, apart = 0.0, 0.0, 0.0
    if complete and len(evals) == expected:
        chances = [stakes.chances[i] for i in good]
        said = [believed(eval, legal_cp[i]) for eval, i in zip(evals, good, strict=True)]
        ordered, apart = differences(chances, said), differences(chances, chances)
        evals_score = _score_evals(said, chances, ordered, stakes)

    best, listed = number.get(parsed.best), parsed.best in moves
    fines = CANDIDATES_FINE * min(1.0, (max(expected, len(moves)) - len(good)) / expected)
    fines += EVALS_FINE * (len(evals) != len(moves))
    fines += ILLEGAL_FINE if best is None else 0.0 if listed else UNLISTED_FINE
    gain = 0.0 if best is None else stakes.gains[best]
    whole = stakes.reward(gain, sum(stakes.gains[i] for i in good), evals_score, fines)
    continuous = round(squeezed(whole), 9)
    level = 1 + sum(continuous >= cut for cut in CUTS)

    loss = 1.0 if best is None else max(stakes.chances) - stakes.chances[best]
    return PolicyScore(
        parsed=True,
        best_legal=best is not None,
        best_value=1.0 - loss,
        best_loss=loss,
        n_candidates=len(moves),
        candidates_legal_distinct=complete,
        best_in_moves=listed,
        best_in_top5=best is not None and legal_cp[best] >= sorted(legal_cp, reverse=True)[expected - 1],
        top1=best is not None and legal_cp[best] == max(legal_cp),
        evals_score=evals_score,
        evals_ordered=ordered,
        evals_apart=apart,
        level=level,
        reward=LEVELS[level] if level > 1 else min(continuous, VALID),
        continuous=continuous,
    )


def _score_evals(said: Sequence[float], chances: Sequence[float], ordered: float, stakes: Stakes) -> float:
    """Evals' score in [0, 1], from the win chances that they say and the true ones: 0 for every constant.

    What the best constant errs in this list, or in the best list if that is less, is all that evals can save; a list of
    equal moves leaves nothing to save, and a list with blunders no more than the best one.
    """
    error = sum(map(abs, map(float.__sub__, said, chances))) / len(chances)
    if stakes.deviation <= 1e-9:
        return float(error <= 1e-9)
    saved = max(0.0, min(deviation(chances), stakes.deviation) - error) / stakes.deviation
    return round((saved + max(0.0, min(1.0, ordered / stakes.apart))) / 2, 9)


def spelled(true_cp: int) -> set[float]:
    """The evals that are the truth: the value as the engine has it, as rows write it, or to a tenth of a pawn, from ten
    pawns on to a whole one."""
    written = {true_cp / 100, *(float(policy.format_eval(true_cp, decimals)) for decimals in (2, 1))}
    return written | ({float(round(true_cp / 100))} if abs(true_cp) >= 995 else set())


def believed(eval: float, true_cp: int) -> float:
    """The win chance that an eval says: the true one if it is the truth, however written."""
    return policy.win_chance(true_cp if eval in spelled(true_cp) else 100.0 * eval)


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
