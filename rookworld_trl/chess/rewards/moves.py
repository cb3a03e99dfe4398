"""What the legal moves of a `P:` row are worth: the scale of the reward, of the exact gradient and of skill.

Values are compared as win chances, in which a lost pawn weighs most where the game is open. What a move *gains* is what
it wins over a random legal move, 0 where it wins nothing; so a position has something at stake as far as its best move
gains more than a random one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rookworld_trl.chess import policy

# The graduated rewards that both tasks share: six steps from unparsable to right in every detail.
LEVELS = (-0.3, 0.2, 0.4, 0.6, 0.8, 1.0)
UNPARSABLE = LEVELS[0]
VALID = LEVELS[1]  # the most that anything known as a cheat may earn

NOTHING_AT_STAKE = 0.01  # points of win chance between the best and the worst move, and no more

# What can be told from chance in a `P:` answer: the move that gets played, the list, the evals; and what is left where
# none of it can, since nothing is at stake.
BEST, LIST, EVALS, NOTHING = 0.50, 0.30, 0.18, 0.02
KNOWN = 0.006  # win chance: values are known to about half a point; what differs by much less hardly counts

# Fines: of rules that are broken. Wherever the moves differ, luck finds some that gain; a rule is kept or it is not.
CANDIDATES_FINE = 0.3  # for the candidates, in equal shares
EVALS_FINE = 0.1  # for another number of evals than of moves
UNLISTED_FINE, ILLEGAL_FINE = 0.25, 0.5  # for a best move outside of the list, for one that is not legal

_FLOOR = -UNPARSABLE - 0.05  # how far below 0 an answer may fall that parses


@dataclass(frozen=True, slots=True)
class Stakes:
    """What is at stake in a position, and how much of the reward each part of an answer carries there.

    Attributes:
        chances: (legal moves,), the win chance that each leads to.
        gains: (legal moves,), how much of it is more than a random legal move's mean; 0 if it is less.
        expected: how many candidates an answer has.
        of_random: the mean gain of a random legal move.
        of_best: the gain of the best move.
        of_list: the mean gain of the best `expected` moves, the reference list.
        deviation: mean distance of the reference list's chances from their median: the error of the best constant.
        apart: the differences between them, over all pairs.
        best, listed, evals: shares of the reward; with what is left they add up to 1.
    """

    chances: tuple[float, ...]
    gains: tuple[float, ...]
    expected: int
    of_random: float
    of_best: float
    of_list: float
    deviation: float
    apart: float
    best: float
    listed: float
    evals: float

    @property
    def per_gain_of_best(self) -> float:
        """What a point of win chance that `B:` gains adds to the reward."""
        return self.best / (self.of_best - self.of_random) if self.best else 0.0

    @property
    def per_gain_of_candidate(self) -> float:
        """What a point of win chance that one candidate gains adds to the reward."""
        return self.listed / (self.of_list - self.of_random) / self.expected if self.listed else 0.0

    def reward(self, best: float, candidates: float, evals: float, fines: float) -> float:
        """The reward of an answer before what is below 0 is squeezed, 1 for the best one.

        Args:
            best: the gain of `B:`.
            candidates: the sum of the candidates' gains.
            evals: the evals' score.
            fines: for the rules that it breaks.
        """
        left = 1.0 - self.best - self.listed - self.evals
        of_best = self.per_gain_of_best * (best - self.of_random)
        of_list = self.per_gain_of_candidate * (candidates - self.expected * self.of_random)
        return left + of_best + of_list + self.evals * evals - fines


@lru_cache(maxsize=4096)  # the samples of a group share their position
def stakes_of(legal_cp: tuple[int, ...]) -> Stakes:
    """The stakes of a position from the values of all its legal moves, in centipawns."""
    chances = tuple(map(policy.win_chance, legal_cp))
    mean, expected = sum(chances) / len(chances), min(policy.MAX_CANDIDATES, len(chances))
    gains = tuple(max(0.0, chance - mean) for chance in chances)
    reference = sorted(chances, reverse=True)[:expected]
    of_random, of_best = sum(gains) / len(gains), max(gains)
    of_list = sum(sorted(gains, reverse=True)[:expected]) / expected
    found = deviation(reference)
    told = [
        weight * _known(stake) if stake > 1e-9 else 0.0
        for weight, stake in ((BEST, of_best - of_random), (LIST, of_list - of_random), (EVALS, found))
    ]
    whole = NOTHING + sum(told)
    best, listed, evals = (each / whole for each in told)
    apart = differences(reference, reference)
    return Stakes(chances, gains, expected, of_random, of_best, of_list, found, apart, best, listed, evals)


def _known(stake: float) -> float:
    """How much of a term counts by what is at stake in it: half where that is `KNOWN`, a hundredth at a tenth of it."""
    return stake**2 / (stake**2 + KNOWN**2)


def deviation(chances: Sequence[float]) -> float:
    """Mean absolute deviation from the median, which is the constant that errs least."""
    median = sorted(chances)[len(chances) // 2]
    return sum(abs(median - chance) for chance in chances) / len(chances)


def differences(chances: Sequence[float], ordered_by: Sequence[float]) -> float:
    """The differences of all pairs, positive where the other numbers order a pair likewise, negative where they turn it
    round, nothing where they are equal."""
    pairs = [(i, j) for i in range(len(chances)) for j in range(i)]
    signs = ((ordered_by[i] > ordered_by[j]) - (ordered_by[i] < ordered_by[j]) for i, j in pairs)
    return sum(sign * (chances[i] - chances[j]) for sign, (i, j) in zip(signs, pairs, strict=True))


def squeezed(reward: float) -> float:
    """The reward, with what is below 0 in its order within [-0.25, 0): above what does not parse."""
    return reward if reward >= 0 else reward / (1.0 - reward / _FLOOR)


def move_values(legal_cp: Sequence[int]) -> list[float]:
    """Each move's value in [0, 1], 1 minus the win chance it gives away: `PolicyScore.best_value` if it were chosen."""
    chances = [policy.win_chance(cp) for cp in legal_cp]
    best = max(chances)
    return [1.0 - (best - chance) for chance in chances]


def random_value(legal_cp: Sequence[int]) -> float:
    """The expected value of a uniformly random legal move."""
    return sum(move_values(legal_cp)) / len(legal_cp)
