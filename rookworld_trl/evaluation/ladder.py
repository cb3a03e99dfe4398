"""A ladder: the model and players of known kind, in games from mirrored openings, rated on one scale.

The model plays each game once, to its end, with a fallback in place of each illegal move: the *lenient* rules. Cut at
the first fallback, and lost there, the same games are those of the *strict* rules, so the two are compared on equal
games. Each of the two is rated by itself, together with the games among the anchors.
"""

import itertools
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import chess

from rookworld_trl.engine import Engine
from rookworld_trl.evaluation.elo import Rating, rate
from rookworld_trl.evaluation.intervals import wilson
from rookworld_trl.play import (
    EnginePlayer,
    Game,
    GameRecord,
    GreedyCapturePlayer,
    ModelPlayer,
    Player,
    RandomPlayer,
    mirrored,
    play_games,
    random_opening,
)
from rookworld_trl.terminal import progress_bar

RULES = ("strict", "lenient")
SCALE_ELO = 1350  # the weakest that Stockfish 15.1 can be set to
NODES = (1, 10, 100)
_LABEL, _CELL = 26, 36  # columns of a table: names, and what stands under each of the rules


@dataclass(frozen=True, slots=True)
class Ladder:
    """Games as they were played, the model's by the lenient rules.

    Attributes:
        model: the rated player's name.
        anchor: the player whose rating is `SCALE_ELO`; empty where nothing is rated.
        origins: the model's moves by `Choice.origin`.
    """

    name: str
    settings: dict[str, Any]
    model: str
    anchor: str
    games: list[GameRecord]
    origins: dict[str, int]

    def records(self, rules: str) -> list[GameRecord]:
        """The games as they end by these rules, void ones left out."""
        games = [game.strict if rules == "strict" else game for game in self.games]
        return [game for game in games if game.white_score is not None]

    def ratings(self, rules: str) -> dict[str, Rating]:
        """Every player's rating, the strongest first; none without an anchor."""
        if not self.anchor:
            return {}
        results = [(game.white, game.black, game.white_score or 0.0) for game in self.records(rules)]
        return dict(sorted(rate(results, self.anchor, SCALE_ELO).items(), key=lambda pair: -pair[1].elo))

    def matches(self, rules: str) -> dict[str, dict[str, Any]]:
        """The model's games by opponent: `won`, `drawn`, `lost`, `score` with its 95 % interval, `ends`."""
        by_opponent: dict[str, list[tuple[float, str]]] = {}
        for game in self.records(rules):
            if self.model in (game.white, game.black):
                score, white = game.white_score or 0.0, game.white == self.model
                met = by_opponent.setdefault(game.black if white else game.white, [])
                met.append((score if white else 1 - score, game.reason))
        return {opponent: _match(games) for opponent, games in by_opponent.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rated = {rules: {name: asdict(each) for name, each in self.ratings(rules).items()} for rules in RULES}
        return {
            "suite": self.name,
            "settings": self.settings,
            "model": self.model,
            "scale": {self.anchor: SCALE_ELO} if self.anchor else {},
            "ratings": rated,
            "matches": {rules: self.matches(rules) for rules in RULES},
            "moves": self.origins,
            "games": [{**asdict(game), "moves": " ".join(game.moves)} for game in self.games],
        }


@contextmanager
def standard_anchors(seed: int = 0) -> Iterator[tuple[Callable[[], list[Player]], str, str]]:
    """The ladder's anchors, anew at each call, the name of the one whose rating is `SCALE_ELO`, and the engine's own.

    From the weakest on: the random mover, the greedy capturer, Stockfish with every second and every fourth move a
    random one, at limited strength, and at fixed nodes. Those with random moves are steps between players that else
    hardly take a point off each other. At limited strength Stockfish plays one of its best four moves at depth 1, drawn
    from the clock: its games alone differ from run to run.

    Raises:
        FileNotFoundError: there is no Stockfish.
        EngineStartError: it does not start, or takes no `UCI_Elo`.
    """
    with ExitStack() as stack:
        engines = {n: stack.enter_context(Engine(nodes=n, hash_mb=1)) for n in NODES}
        limits = {"UCI_LimitStrength": True, "UCI_Elo": SCALE_ELO}
        limited = stack.enter_context(Engine(depth=1, hash_mb=1, options=limits))
        scale = f"Stockfish, UCI_Elo {SCALE_ELO}"

        def anchors() -> list[Player]:
            return [
                RandomPlayer(seed),
                GreedyCapturePlayer(seed),
                EnginePlayer(engines[1], "Stockfish, 1/2 random", 1 / 2, seed),
                EnginePlayer(engines[1], "Stockfish, 1/4 random", 1 / 4, seed),
                EnginePlayer(limited, scale),
                *(EnginePlayer(engine, f"Stockfish, {n} node{'s'[: n > 1]}") for n, engine in engines.items()),
            ]

        yield anchors, scale, limited.name


def run_ladder(
    model: ModelPlayer,
    anchors: Callable[[], Sequence[Player]],
    anchor: str,
    engine: str = "",
    *,
    openings: int,
    opening_plies: int = 4,
    max_plies: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Ladder:
    """Play the model against every anchor, and each anchor against the next two, each opening with both colours.

    Args:
        anchors: from the weakest on; called anew for each pairing, so that no pairing's random moves depend on
            another's games.
        anchor: the name of the one whose rating is `SCALE_ELO`.
        engine: told among the settings, since the scale is the engine's.
        openings: random ones, `opening_plies` legal plies from the start; a pairing has twice as many games.
        max_plies: a game that gets there is a draw.

    Raises:
        ValueError: no openings, or as in `rate`.
    """
    if openings < 1:
        raise ValueError(f"openings must be above 0; got {openings}")
    rng = random.Random(seed)
    fens = [random_opening(rng, opening_plies).fen() for _ in range(openings)]
    games = [game for one in range(len(anchors())) for game in mirrored(model, anchors()[one], fens)]
    for one, two in itertools.combinations(range(len(anchors())), 2):
        if two - one <= 2:
            met = anchors()
            games += mirrored(met[one], met[two], fens)
    settings: dict[str, Any] = {
        "openings": openings,
        "opening_plies": opening_plies,
        "max_plies": max_plies,
        "seed": seed,
    }
    settings |= {"engine": engine} if engine else {}
    return _played("ladder", settings, model, anchor, games, max_plies, progress)


def run_llm_chess(model: ModelPlayer, *, games: int, seed: int = 0, progress: bool = False) -> Ladder:
    """The game of llm_chess (Saplin 2024): Black against a random White, 200 plies at most.

    Give the model two retries: three illegal moves in a row lose. Unlike there, a draw by threefold repetition or the
    50-move rule is claimed.

    Raises:
        ValueError: no games.
    """
    if games < 1:
        raise ValueError(f"games must be above 0; got {games}")
    white = RandomPlayer(seed)
    settings = {"games": games, "max_plies": 200, "seed": seed}
    return _played("llm_chess", settings, model, "", [(white, model, chess.STARTING_FEN)] * games, 200, progress)


def _played(
    name: str, settings: dict[str, Any], model: ModelPlayer, anchor: str, games: list[Game], plies: int, progress: bool
) -> Ladder:
    with progress_bar(name if progress else "", len(games), "game") as bar:
        records = play_games(games, plies, bar.update)
    return Ladder(name, settings, model.name, anchor, records, dict(model.origins.most_common()))


def ladder_table(ladder: Ladder) -> str:
    """Ratings of all players, and the model's matches, by both rules; below, how its games ended."""
    settings = ", ".join(f"{name}={value}" for name, value in ladder.settings.items())
    void = len(ladder.games) - len(ladder.records("lenient"))
    lines = [f"{ladder.name}, {len(ladder.games)} games{f', {void} void' if void else ''}", f"  {settings}", ""]
    lines += [f"{'':{_LABEL}}" + "".join(f"{f'{rules} rules':>{_CELL}}" for rules in RULES)]
    if ladder.anchor:
        strict, lenient = (ladder.ratings(rules) for rules in RULES)
        lines += [f"{'  player':{_LABEL}}" + f"{'Elo':>10}{'95 % interval':>18}{'points':>8}" * 2]
        lines += [f"{f'  {name[:23]}':{_LABEL}}{_rated(strict[name])}{_rated(lenient[name])}" for name in strict]
        lines += [""]
    matches = {rules: ladder.matches(rules) for rules in RULES}
    lines += [f"{f'  {ladder.model[:15]} against':{_LABEL}}" + f"{'won/drawn/lost':>15}{'points':>7}{'95 %':>14}" * 2]
    for opponent in matches["strict"]:
        cells = "".join(_score(matches[rules][opponent]) for rules in RULES)
        lines.append(f"{f'  {opponent[:23]}':{_LABEL}}{cells}")
    lines += [""]
    for rules in RULES:
        ends = sum((Counter(match["ends"]) for match in matches[rules].values()), Counter[str]())
        lines += _shares(f"{rules} games", ends)
    lines += _shares("moves", ladder.origins)
    if ladder.anchor:
        lines += [
            "",
            f"{ladder.anchor} = {SCALE_ELO}; other scales cannot be compared. Elo by joint maximum likelihood over all",
            "games (Bradley-Terry, one virtual draw a player), with its 95 % interval; < or >: no point won or lost.",
        ]
    return "\n".join(lines)


def _match(games: Sequence[tuple[float, str]]) -> dict[str, Any]:
    names = {1.0: "won", 0.5: "drawn", 0.0: "lost"}
    counts = Counter(names[score] for score, _ in games)
    points = sum(score for score, _ in games)
    low, high = wilson(points, len(games))
    ends = Counter(f"{names[score]} by {reason}" for score, reason in games)
    found = {name: counts[name] for name in names.values()}
    return {**found, "score": points / len(games), "ci_low": low, "ci_high": high, "ends": dict(ends.most_common())}


def _rated(rating: Rating) -> str:
    """36 characters: the rating, its interval (where there is a bound only, that alone), and points in percent."""
    elo, low, high = f"{rating.elo:.0f}", rating.ci_low, rating.ci_high
    interval = f"[{low:.0f}, {high:.0f}]" if low is not None and high is not None else ""
    if not interval:
        elo, interval = "", f"< {high:.0f}" if high is not None else f"> {low:.0f}"
    return f"{elo:>10}{interval:>18}{100 * rating.points / rating.games:>8.1f}"


def _score(match: dict[str, Any]) -> str:
    """36 characters: games won, drawn and lost, points in percent and their interval."""
    counts = f"{match['won']}/{match['drawn']}/{match['lost']}"
    interval = f"[{100 * match['ci_low']:.1f}, {100 * match['ci_high']:.1f}]"
    return f"{counts:>15}{100 * match['score']:>7.1f}{interval:>14}"


def _shares(title: str, counts: Mapping[str, int]) -> list[str]:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    text = f"{title}: " + ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in ordered)
    return textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")
