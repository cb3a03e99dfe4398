"""The ladder: a model's matches against its anchors from mirrored openings, all players rated on one scale.

A model plays each game once, to its end, with another move in place of each illegal one:
the *lenient* rules. Cut at the first illegal move, and lost there, the same games are those of the *strict* rules, so
the two are compared on equal games. Each of the two is rated by itself, together with the games among the anchors.

Two models' ladders are compared as one: every game of both in one fit, in which the anchors are the same players. Each
ladder by itself has a scale of its own, though one anchor has the same rating on both: what the model scored against
the other anchors moves them too, by hundreds of points where they are far from the fixed one.

Engines are told the whole game, so that they see repetitions. Still a side that cannot win may draw by repeating, so
games won stand beside the points, and beside them how many games ended by repetition: a gain in play is one in wins.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np

from rookworld_trl.chess.engine import Engine, find_engine
from rookworld_trl.chess.play import (
    EnginePlayer,
    GameRecord,
    GreedyCapturePlayer,
    ModelPlayer,
    Player,
    RandomPlayer,
    mirrored,
    play_games,
)
from rookworld_trl.measuring.comparison import Comparison, judged
from rookworld_trl.measuring.elo import Rating, rate, resampled
from rookworld_trl.measuring.intervals import MIN_CLUSTERS, percentile_interval, wilson
from rookworld_trl.measuring.metrics import ratio
from rookworld_trl.measuring.result import Headline, Item, Result
from rookworld_trl.measuring.tables import bounded, few
from rookworld_trl.settings.terminal import progress_bar

RULES = ("strict", "lenient")
REPETITION = "threefold repetition"
DRAWS = "repetition and 50 moves, claimed at once, and the limit of plies, whatever the position"
BEFORE, AFTER = "the model, before", "the model, after"
NODES = (1, 10, 100)
_LABEL, _CELL = 26, 38  # columns of a table: names, and what stands under each of the rules


@dataclass(frozen=True, slots=True)
class Ladder(Result):
    """Games as they were played, the model's by the lenient rules; its points game by game are the items.

    Attributes:
        model: the name of the player whose matches are shown.
        anchor: the player whose rating is 0.
    """

    model: str = ""
    anchor: str = ""
    games: list[GameRecord] = field(default_factory=list)

    def records(self, rules: str) -> list[GameRecord]:
        """The games as they end by these rules, void ones left out."""
        games = [game.strict if rules == "strict" else game for game in self.games]
        return [game for game in games if game.white_score is not None]

    def ratings(self, rules: str) -> dict[str, Rating]:
        """Every player's rating, the strongest first."""
        results = [(game.white, game.black, game.white_score or 0.0) for game in self.records(rules)]
        return dict(sorted(rate(results, self.anchor).items(), key=lambda pair: -pair[1].elo))

    def matches(self, rules: str) -> dict[str, dict[str, Any]]:
        """The model's games by opponent: `won`, `drawn`, `lost`, `repeated` (the share drawn by repetition), `score`
        with its 95 % interval, `ends`.

        Below `MIN_CLUSTERS` games the interval is None.
        """
        by_opponent: dict[str, list[tuple[float, str]]] = {}
        for game in self.records(rules):
            if self.model in (game.white, game.black):
                opponent, score = _seen_by(self.model, game)
                by_opponent.setdefault(opponent, []).append((score, game.reason))
        return {opponent: _match(games) for opponent, games in by_opponent.items()}

    def pgn(self) -> str:
        """All games, one behind the other."""
        return "\n".join(game.pgn(self.name, str(number)) for number, game in enumerate(self.games, 1))

    def main_numbers(self) -> list[Headline]:
        """Wins, points and repetitions by both rules, then ratings."""
        found, points = [], self.estimates()
        for metric in self.metrics:
            found.append(Headline(metric.label, metric.format, points[metric.name], {}))
        for rules in RULES:
            ratings = self.ratings(rules)
            own, label = ratings[self.model], f"Elo, {rules} rules ({self.anchor} = 0)"
            bounds = {"ci_low": own.ci_low, "ci_high": own.ci_high, "clusters": own.games}
            rating: Any = {"value": own.elo, "numerator": own.points, "denominator": float(own.games), **bounds}
            others = {name: each.elo for name, each in ratings.items() if name in ("random", "greedy capture")}
            found.append(Headline(label, ".0f", rating, others))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rated = {rules: {name: asdict(each) for name, each in self.ratings(rules).items()} for rules in RULES}
        return {
            **Result.to_dict(self),
            "model": self.model,
            "scale": {self.anchor: 0},
            "ratings": rated,
            "matches": {rules: self.matches(rules) for rules in RULES},
            "games": [{**asdict(game), "moves": " ".join(game.moves)} for game in self.games],
        }

    def earlier(self, data: Mapping[str, Any]) -> "Ladder":
        """Raises:
        ValueError: the other ladder is on another scale.
        """
        before = Result.earlier(self, data)
        if data.get("scale") != {self.anchor: 0}:
            raise ValueError(f"the baseline's ratings are on another scale ({data.get('scale')}, here {self.anchor})")
        games = [GameRecord(**{**game, "moves": tuple(game["moves"].split())}) for game in data["games"]]
        return replace(before, model=data["model"], games=games)

    def further(self, before: Result) -> list[Comparison]:
        """The model's rating on an earlier ladder and on this one, both on one scale.

        The interval is of the difference, drawn over openings: an opening brings along every game of both ladders that
        began from it, so that what both share, the anchors' games and the opening's luck, is drawn once for both. There
        is none where a model lost or won every game, for its rating then rests on the prior. `clusters` counts
        openings, those of the ladder that has fewer.
        """
        return [_change(before, self, rules) for rules in RULES] if isinstance(before, Ladder) else []


def ladder_of(settings: dict[str, Any], model: str, anchor: str, games: list[GameRecord], mode: str = "") -> Ladder:
    """A ladder with the model's wins and points game by game, filed under its opponents; wins are the headlines."""
    items: list[Item] = []
    met = Counter[str]()
    for game in games:
        if model in (game.white, game.black):
            opponent, _ = _seen_by(model, game)
            met[opponent] += 1
            scores = {"played": float(game.white_score is not None)}
            for rules, record in (("strict", game.strict), ("lenient", game)):
                points = scores["played"] * _seen_by(model, record)[1]
                scores |= {rules: points, f"won_{rules}": float(points == 1)}
                scores[f"repeated_{rules}"] = float(record.reason == REPETITION)
            about = (scores, game.fen, " ".join(game.moves), {"opponent": opponent})
            items.append(Item(f"{opponent}, game {met[opponent]}", *about))
    wins = [ratio(f"won_{rules}", f"games won, {rules} rules", "played") for rules in RULES]
    metrics = [*wins, *(ratio(rules, f"points, {rules} rules", "played") for rules in RULES)]
    metrics += [ratio(f"repeated_{rules}", f"repetitions, {rules} rules", "played", better=0) for rules in RULES]
    whose: Any = {"model": model, "anchor": anchor, "headlines": tuple(metric.name for metric in wins)}
    return Ladder("ladder", metrics, items, mode, settings, **whose, games=games)


def _seen_by(model: str, game: GameRecord) -> tuple[str, float]:
    """The opponent, and the model's points; 0 of a void game."""
    score = game.white_score
    if game.white == model:
        return game.black, score or 0.0
    return game.white, 0.0 if score is None else 1 - score


def _change(before: Ladder, after: Ladder, rules: str) -> Comparison:
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
    ratings = rate(results, after.anchor)
    old, new, clusters = ratings[BEFORE], ratings[AFTER], min(openings)
    low, high = None, None
    if all(0 < each.points < each.games for each in (old, new)):
        drawn = resampled(results, [game[3] for game in games], after.anchor, (BEFORE, AFTER))
        # Rounded, for the fit ends within 1e-9 nats, and that is no gain.
        low, high = percentile_interval(np.round(drawn[:, 1] - drawn[:, 0], 3), clusters)
    place: Any = {"task": after.name, "prefix": "", "mode": after.mode, "headline": False, "baselines": {}}
    place |= {"metric": f"elo_{rules}", "label": f"Elo, {rules} rules", "format": ".0f", "baselines_after": {}}
    row = judged((old.elo, new.elo, round(new.elo - old.elo, 3) + 0.0), (low, high), 1)  # no -0
    return cast(Comparison, {**place, **row, "items": min(old.games, new.games), "clusters": clusters})


@contextmanager
def standard_anchors(seed: int = 0) -> Iterator[Callable[[], list[Player]]]:
    """What makes the ladder's anchors anew, so that no pairing's random moves depend on another's games.

    From the weakest on: the random mover, the greedy capturer, Stockfish with every second and every fourth move a
    random one, and at fixed nodes. Those with random moves are steps between players that else hardly take a point off
    each other. Where there is no Stockfish, the first two are all, and a line says so.

    Raises:
        ValueError: Stockfish does not start.
    """
    try:
        find_engine()
    except FileNotFoundError:
        print("no Stockfish here: the ladder's only anchors are the random mover and the greedy capturer\n")
        yield lambda: [RandomPlayer(seed), GreedyCapturePlayer(seed)]
        return
    with ExitStack() as stack:
        engines = {n: stack.enter_context(Engine(nodes=n, hash_mb=1)) for n in NODES}
        yield lambda: [
            RandomPlayer(seed),
            GreedyCapturePlayer(seed),
            EnginePlayer(engines[1], "Stockfish, 1/2 random", 1 / 2, seed),
            EnginePlayer(engines[1], "Stockfish, 1/4 random", 1 / 4, seed),
            *(EnginePlayer(engine, f"Stockfish, {n} node{'s'[: n > 1]}") for n, engine in engines.items()),
        ]


def run_ladder(
    model: ModelPlayer,
    anchors: Callable[[], Sequence[Player]],
    *,
    openings: Sequence[str],
    max_plies: int = 200,
    seed: int = 0,
    mode: str = "",
    progress: bool = False,
) -> Ladder:
    """Play the model against every anchor, and each anchor against the next two, each opening with both colours.

    Args:
        anchors: makes new players, from the weakest on. The first one's rating is 0. An engine among them is told in
            the settings, since the scale is the engine's.
        openings: FENs, one or more; a pairing has twice as many games.
        max_plies: a game that gets there is a draw.
    """
    met = [anchors() for _ in anchors()]
    games = [game for number, each in enumerate(met) for game in mirrored(model, each[number], openings)]
    for one, two in itertools.combinations(range(len(met)), 2):
        if two - one <= 2:
            each = anchors()
            games += mirrored(each[one], each[two], openings)
    settings: dict[str, Any] = {"openings": len(openings), "max_plies": max_plies, "draws": DRAWS, "seed": seed}
    if engines := [each.engine.name for each in met[0] if isinstance(each, EnginePlayer)]:
        settings["engine"] = engines[0]
    with progress_bar("ladder" if progress else "", len(games), "game") as bar:
        records = play_games(games, max_plies, bar.update)
    return ladder_of(settings, model.name, met[0][0].name, records, mode)


def ladder_table(ladder: Ladder) -> str:
    """Ratings of all players, and the model's matches, by both rules."""
    settings = ", ".join(f"{name}={value}" for name, value in ladder.settings.items() if name != "draws")
    void = len(ladder.games) - len(ladder.records("lenient"))
    lines = [f"{ladder.name}, {len(ladder.games)} games{f', {void} void' if void else ''}", f"  {settings}", ""]
    lines += [f"{'':{_LABEL}}" + "".join(f"{f'{rules} rules':>{_CELL}}" for rules in RULES)]
    strict, lenient = (ladder.ratings(rules) for rules in RULES)
    lines += [f"{'  player':{_LABEL}}" + f"{'Elo, 95 % interval':>30}{'points':>8}" * 2]
    lines += [f"{f'  {name[:23]}':{_LABEL}}{_rated(strict[name])}{_rated(lenient[name])}" for name in strict]
    lines += [""]
    matches = {rules: ladder.matches(rules) for rules in RULES}
    lines += [f"{f'  {ladder.model[:15]} against':{_LABEL}}" + f"{'w/d/l':>12}{'points, 95 %':>21}{'rep.':>5}" * 2]
    for opponent in matches["strict"]:
        cells = "".join(_score(matches[rules][opponent]) for rules in RULES)
        lines.append(f"{f'  {opponent[:23]}':{_LABEL}}{cells}")
    lines += [
        "",
        "w/d/l: won, drawn, lost; rep.: of these drawn by repetition, in percent. Engines are told the game.",
        f"Draws are {DRAWS}.",
        f"{ladder.anchor} = 0; other scales cannot be compared. Elo by joint maximum",
        "likelihood over all games (Bradley-Terry; each player brings half a virtual draw), with its 95 %",
        "interval; < or >: no point won or lost.",
    ]
    return "\n".join([*lines, *few(lines)])


def _match(games: Sequence[tuple[float, str]]) -> dict[str, Any]:
    names = {1.0: "won", 0.5: "drawn", 0.0: "lost"}
    counts = Counter(names[score] for score, _ in games)
    points = sum(score for score, _ in games)
    low, high = wilson(points, len(games)) if len(games) >= MIN_CLUSTERS else (None, None)
    ends = Counter(f"{names[score]} by {reason}" for score, reason in games)
    found: dict[str, Any] = {name: counts[name] for name in names.values()}
    found["repeated"] = sum(reason == REPETITION for _, reason in games) / len(games)
    return {**found, "score": points / len(games), "ci_low": low, "ci_high": high, "ends": dict(ends.most_common())}


def _rated(rating: Rating) -> str:
    """38 characters: the rating with its interval, and points in percent."""
    elo = bounded(asdict(rating) | {"clusters": rating.games}, "elo", ".0f")
    return f"{elo:>30}{100 * rating.points / rating.games:>8.1f}"


def _score(match: dict[str, Any]) -> str:
    """38 characters: games won, drawn and lost, points in percent with their interval, and draws by repetition."""
    counts = [match[name] for name in ("won", "drawn", "lost")]
    points = bounded(match | {"clusters": sum(counts)}, "score", "percent")
    return f"{'/'.join(map(str, counts)):>12}{points:>21}{100 * match['repeated']:>5.0f}"
