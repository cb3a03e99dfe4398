"""Two models' ladders as one: every game of both in one fit, in which the anchors are the same players.

Each ladder by itself has a scale of its own, though one anchor has the same rating on both: what the model scored
against the other anchors moves them too, by hundreds of points where they are far from the fixed one. So ratings of two
fits cannot be subtracted.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from rookworld_trl.chess.games import GameRecord
from rookworld_trl.chess.ladder import RULES, Ladder
from rookworld_trl.measuring.comparison import Comparison
from rookworld_trl.measuring.elo import rate, resampled
from rookworld_trl.measuring.intervals import percentile_interval

BEFORE, AFTER = "the model, before", "the model, after"


def elo_changes(before: Mapping[str, Any], after: Ladder, mode: str) -> list[Comparison]:
    """The model's rating on an earlier ladder, as its `to_dict` told it, and on this one, both on one scale.

    The interval is of the difference, drawn over openings: an opening brings along every game of both ladders that
    began from it, so that what both share, the anchors' games and the opening's luck, is drawn once for both. There is
    none where a model lost or won every game, for its rating then rests on the prior. `clusters` counts openings, those
    of the ladder that has fewer.

    Raises:
        ValueError: the two are on different scales, or the earlier one is malformed or of an older version.
    """
    scale = {after.anchor: after.anchor_elo}
    if before.get("scale") != scale:
        raise ValueError(f"the baseline's ratings are on another scale ({before.get('scale')}, here {scale})")
    return [_change(_earlier(before, after), after, rules, mode) for rules in RULES if scale]


def _change(before: Ladder, after: Ladder, rules: str, mode: str) -> Comparison:
    anchors: Counter[GameRecord] = Counter()
    games: list[tuple[str, str, float, str]] = []  # White, Black, White's points, the opening
    openings = []
    for ladder, name in ((before, BEFORE), (after, AFTER)):
        records = ladder.records(rules)
        own = [game for game in records if ladder.model in (game.white, game.black)]
        for game in own:
            white, black = (name if player == ladder.model else player for player in (game.white, game.black))
            games.append((white, black, game.white_score or 0.0, game.fen))
        openings.append(len({game.fen for game in own}))
        # With one seed the anchors' games are the same ones on both ladders, and count once.
        anchors |= Counter(game for game in records if ladder.model not in (game.white, game.black))
    games += [(game.white, game.black, game.white_score or 0.0, game.fen) for game in anchors.elements()]
    results = [game[:3] for game in games]
    ratings = rate(results, after.anchor, after.anchor_elo)
    old, new, clusters = ratings[BEFORE], ratings[AFTER], min(openings)
    low, high = None, None
    if all(0 < each.points < each.games for each in (old, new)):
        drawn = resampled(results, [game[3] for game in games], after.anchor, (BEFORE, AFTER))
        # Rounded, for the fit ends within 1e-9 nats, and that is no gain.
        low, high = percentile_interval(np.round(drawn[:, 1] - drawn[:, 0], 3), clusters)
    up, down = low is not None and low > 0, high is not None and high < 0
    return Comparison(
        task=after.name,
        mode=mode,
        metric=f"elo_{rules}",
        label=f"Elo, {rules} rules",
        headline=True,
        format=".0f",
        before=old.elo,
        after=new.elo,
        difference=round(new.elo - old.elo, 3) + 0.0,  # no -0
        ci_low=low,
        ci_high=high,
        p_value=None,
        items=min(old.games, new.games),
        clusters=clusters,
        significant=up or down,
        better=1,
        loss=down,
        baselines={},
        baselines_after={},
    )


def _earlier(before: Mapping[str, Any], after: Ladder) -> Ladder:
    """The ladder that `Ladder.to_dict` told of."""
    name = before.get("suite")
    try:
        settings = dict(before["settings"])
        games = [{**game, "moves": tuple(game["moves"].split())} for game in before["games"]]
        if any("first_illegal" not in game for game in games):  # without retries the two were one
            if settings.get("retries"):
                raise ValueError(
                    f"the baseline's '{name}' was played with retries by an older version, whose strict rules forgave "
                    "what was sampled again; measure it again"
                )
            games = [{**game, "first_illegal": game["first_fallback"]} for game in games]
        records = [GameRecord(**game) for game in games]
        return Ladder(after.name, settings, before["model"], after.anchor, after.anchor_elo, records, {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the baseline's '{name}' is none that recipes/evaluate.py wrote: {error}") from error
