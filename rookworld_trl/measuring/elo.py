"""Elo ratings of several players by joint maximum likelihood over all their games, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rookworld_trl.measuring.intervals import MIN_CLUSTERS, RESAMPLES, Array

POINTS_PER_NAT = 400 / math.log(10)  # 400 Elo points are odds of ten to one
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Rating:
    """A player's rating and its 95 % interval.

    Attributes:
        ci_low, ci_high: None on the side that is open: a player who lost (won) every game is only known to be at most
            (at least) so strong, and `elo` then rests on the prior. Both are None below `MIN_CLUSTERS` games.
        points: of `games`; a draw is half a point.
    """

    elo: float
    ci_low: float | None
    ci_high: float | None
    points: float
    games: int


def rate(results: Sequence[tuple[str, str, float]], anchor: str) -> dict[str, Rating]:
    """Rate all players of a set of games on one scale, on which the anchor has 0.

    The model is Bradley and Terry's (1952): player i scores 1 / (1 + 10^((R_j - R_i) / 400)) of the points against j; a
    draw is half a point for each. Colours are left out: openings are mirrored. So that a player who won or lost every
    game has a finite rating, each player brings half a virtual draw, spread over its opponents as its games are
    (BayesElo's prior, Coulom 2008, a quarter as strong): a pairing of n games has n/2 (1/N + 1/M) virtual draws on top,
    N and M being all games of the one and of the other. Where every player has as many games that is one virtual draw a
    player. Else a player has half of one, what it brings itself, and more the more of its opponents play little but it.

    The interval is Wald's, from the observed information; it is that of the difference to the anchor. Draws make it
    conservative, and mirrored openings take out the opening's luck.

    Args:
        results: of each game the two players and the points of the first: 1, 0.5 or 0.

    All players are connected with the anchor by games.

    Raises:
        ValueError: the anchor has no game.
    """
    number, points = _points(results, [""] * len(results))
    if anchor not in number:
        raise ValueError(f"'{anchor}' has no game that counts, so that nothing fixes the scale")
    points = points[0]
    games = points + points.T
    nats, variance = _fit(points, number[anchor])
    ratings = {}
    for name, i in number.items():
        elo, half = float(POINTS_PER_NAT * nats[i]), _Z * POINTS_PER_NAT * math.sqrt(variance[i])
        won, played = float(points[i].sum()), round(games[i].sum())
        low, high = (None if won == 0 else elo - half), (None if won == played else elo + half)
        low, high = (low, high) if played >= MIN_CLUSTERS else (None, None)
        ratings[name] = Rating(elo, elo, elo, won, played) if name == anchor else Rating(elo, low, high, won, played)
    return ratings


def resampled(
    results: Sequence[tuple[str, str, float]],
    clusters: Sequence[str],
    anchor: str,
    players: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Array:
    """Ratings of some players when whole clusters of games are drawn again, all players rated anew in each draw.

    Args:
        results: as in `rate`, whose prior is on top of each draw.
        clusters: of each game, such as the opening that it began from.

    Returns:
        (resamples, players), relative to the anchor; NaN where a draw's games do not connect all players.
    """
    number, points = _points(results, clusters)
    counts = np.random.default_rng(seed).multinomial(len(points), [1 / len(points)] * len(points), size=resamples)
    drawn = np.tensordot(counts, points, axes=1)
    whole = _reached(drawn + drawn.swapaxes(-1, -2), number[anchor]).all(axis=-1)
    ratings = np.full((resamples, len(players)), np.nan)
    nats, _ = _fit(drawn[whole], number[anchor])
    ratings[whole] = POINTS_PER_NAT * nats[:, [number[name] for name in players]]
    return ratings


def _points(results: Sequence[tuple[str, str, float]], clusters: Sequence[str]) -> tuple[dict[str, int], Array]:
    """Each player's number, and by cluster the points of each player against each: (clusters, players, players)."""
    number = {name: i for i, name in enumerate(dict.fromkeys(name for *pair, _ in results for name in pair))}
    places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    points = np.zeros((len(places), len(number), len(number)))
    for (first, second, score), cluster in zip(results, clusters, strict=True):
        points[places[cluster], number[first], number[second]] += score
        points[places[cluster], number[second], number[first]] += 1 - score
    return number, points


def _reached(games: Array, anchor: int) -> NDArray[np.bool_]:
    """(..., players): whether games connect a player with the anchor, of the games (..., players, players)."""
    players = games.shape[-1]
    return (
        np.linalg.matrix_power(((games > 0) | np.eye(players, dtype=bool)).astype(float), players)[..., anchor, :] > 0
    )


def _fit(points: Array, anchor: int) -> tuple[Array, Array]:
    """Strengths in nats with the anchor's at 0, and their variances, by Newton's method on the concave likelihood.

    Args:
        points: (..., players, players), real ones; the prior's are added here.
    """
    games = points + points.swapaxes(-1, -2)
    share = games / games.sum(axis=-1, keepdims=True)
    virtual = (share + share.swapaxes(-1, -2)) / 2
    points, games = points + virtual / 2, games + virtual
    strength, variance = np.zeros(points.shape[:-1]), np.zeros(points.shape[:-1])
    free = np.arange(points.shape[-1]) != anchor
    for _ in range(1000):
        expected = 1 / (1 + np.exp(strength[..., None, :] - strength[..., :, None]))
        weight = games * expected * (1 - expected)
        information = (np.eye(len(free)) * weight.sum(axis=-1)[..., None] - weight)[..., free, :][..., free]
        slope = (points - games * expected).sum(axis=-1)[..., free]
        step = np.linalg.solve(information, slope[..., None])[..., 0]
        # A nat at a time: far off, Newton overshoots.
        strength[..., free] += step / np.maximum(1.0, np.abs(step).max(axis=-1, keepdims=True))
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    variance[..., free] = np.diagonal(np.linalg.inv(information), axis1=-2, axis2=-1)
    return strength, variance
