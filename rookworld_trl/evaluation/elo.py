"""Elo ratings of several players by joint maximum likelihood over all their games, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

POINTS_PER_NAT = 400 / math.log(10)  # 400 Elo points are odds of ten to one
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Rating:
    """A player's rating and its 95 % interval.

    Attributes:
        ci_low, ci_high: None on the side that is open: a player who lost (won) every game is only known to be at most
            (at least) so strong, and `elo` then rests on the prior.
        points: of `games`; a draw is half a point.
    """

    elo: float
    ci_low: float | None
    ci_high: float | None
    points: float
    games: int


def rate(results: Sequence[tuple[str, str, float]], anchor: str, anchor_elo: float) -> dict[str, Rating]:
    """Rate all players of a set of games on one scale, on which the anchor has `anchor_elo`.

    The model is Bradley and Terry's (1952): player i scores 1 / (1 + 10^((R_j - R_i) / 400)) of the points against j; a
    draw is half a point for each. Colours are left out: openings are mirrored. So that a player who won or lost every
    game has a finite rating, each player has one virtual draw on top, spread over its opponents as its games are
    (BayesElo's prior, Coulom 2008, with one draw for two). The interval is Wald's, from the observed information; it is
    that of the difference to the anchor. Draws make it conservative, and mirrored openings take out the opening's luck.

    Args:
        results: of each game the two players and the points of the first: 1, 0.5 or 0.

    Raises:
        ValueError: the anchor has no game, or players are not connected to it by games.
    """
    names = list(dict.fromkeys(name for first, second, _ in results for name in (first, second)))
    if anchor not in names:
        raise ValueError(f"'{anchor}' has no game that counts, so that nothing fixes the scale")
    number = {name: i for i, name in enumerate(names)}
    points = np.zeros((len(names), len(names)))
    for first, second, score in results:
        points[number[first], number[second]] += score
        points[number[second], number[first]] += 1 - score
    games = points + points.T
    reached = np.linalg.matrix_power((games > 0) + np.eye(len(names)), len(names))[number[anchor]] > 0
    if not reached.all():
        apart = ", ".join(name for name in names if not reached[number[name]])
        raise ValueError(f"no games connect {apart} with {anchor}: their ratings cannot be compared")
    share = games / games.sum(axis=1, keepdims=True)
    virtual = (share + share.T) / 2
    nats, variance = _fit(points + virtual / 2, games + virtual, number[anchor])
    ratings = {}
    for name, i in number.items():
        elo, half = anchor_elo + POINTS_PER_NAT * nats[i], _Z * POINTS_PER_NAT * math.sqrt(variance[i])
        won, played = float(points[i].sum()), round(games[i].sum())
        low, high = (None if won == 0 else elo - half), (None if won == played else elo + half)
        ratings[name] = Rating(elo, elo, elo, won, played) if name == anchor else Rating(elo, low, high, won, played)
    return ratings


def _fit(points: np.ndarray, games: np.ndarray, anchor: int) -> tuple[np.ndarray, np.ndarray]:
    """Strengths in nats with the anchor's at 0, and their variances, by Newton's method on the concave likelihood."""
    strength, variance = np.zeros(len(games)), np.zeros(len(games))
    free = np.arange(len(games)) != anchor
    for _ in range(1000):
        expected = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        weight = games * expected * (1 - expected)
        information = (np.diag(weight.sum(axis=1)) - weight)[np.ix_(free, free)]
        step = np.linalg.solve(information, (points - games * expected).sum(axis=1)[free])
        strength[free] += step / max(1.0, float(np.abs(step).max()))  # a nat at a time: far off, Newton overshoots
        if np.abs(step).max() < 1e-9:
            break
    variance[free] = np.diag(np.linalg.inv(information))
    return strength, variance
