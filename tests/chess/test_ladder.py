"""The ladder with players whose every result is known, two in one fit, and the recipe that runs them."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import chess
import chess.pgn
import numpy as np
import pytest

from rookworld_trl.chess.ladder import Ladder, ladder_table, run_ladder, standard_anchors
from rookworld_trl.chess.ladder import ladder_of as recorded
from rookworld_trl.chess.play import Choice, GameRecord, RandomPlayer, random_openings
from rookworld_trl.measuring import against
from rookworld_trl.measuring.comparison import Comparison
from rookworld_trl.measuring.elo import rate
from rookworld_trl.measuring.tables import comparison_table
from tests.support.stockfish import requires_stockfish


class Faulty(RandomPlayer):
    """Stands in for a model: random moves, and from the tenth full move on they are fallbacks."""

    name = "faulty"

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        origins: list[Any] = ["candidates" if board.fullmove_number >= 10 else "own" for board in boards]
        return [choice._replace(origin=origin) for choice, origin in zip(super().choose(boards), origins, strict=True)]


class Named(RandomPlayer):
    """A random mover by another name."""

    def __init__(self, name: str):
        super().__init__(len(name))
        self.name = name


def anchors() -> list[Any]:
    return [Named("x"), Named("yy"), Named("zzz"), Named("wwww")]


def ladder_of(openings: int = 3, make: Any = anchors, model: Any = None, max_plies: int = 40, seed: int = 5) -> Ladder:
    fens = random_openings(openings, seed)
    return run_ladder(model or Faulty(), make, openings=fens, max_plies=max_plies, seed=seed)


def test_who_plays_whom_and_from_where() -> None:
    ladder = ladder_of()
    pairings = Counter(frozenset((game.white, game.black)) for game in ladder.games)
    met = ["faulty x", "faulty yy", "faulty zzz", "faulty wwww", "x yy", "x zzz", "yy zzz", "yy wwww", "zzz wwww"]
    assert pairings == {frozenset(pair.split()): 6 for pair in met}  # not x and wwww: each meets the next two
    fens = {game.fen for game in ladder.games}
    assert len(fens) == 3
    assert {chess.Board(fen).ply() for fen in fens} == {4}
    by_colours = Counter((game.white, game.black, game.fen) for game in ladder.games)
    assert set(by_colours.values()) == {1}
    assert all(by_colours[black, white, fen] == 1 for white, black, fen in by_colours)


def test_strict_games_are_the_lenient_ones_cut_and_each_is_rated_with_the_anchors() -> None:
    ladder = ladder_of()
    assert ladder == ladder_of()
    strict, lenient = ladder.matches("strict"), ladder.matches("lenient")
    assert list(strict) == list(lenient) == ["x", "yy", "zzz", "wwww"]
    for opponent in strict:
        games = [game for game in ladder.games if {game.white, game.black} == {"faulty", opponent}]
        early = [game for game in games if game.first_illegal is None]  # over before the tenth move
        assert strict[opponent]["ends"]["lost by illegal move"] == 6 - len(early)
        assert strict[opponent]["won"] + strict[opponent]["drawn"] + strict[opponent]["lost"] == 6
        drawn = sum(game.result == "1/2-1/2" for game in games)
        assert (lenient[opponent]["drawn"], "lost by illegal move" in lenient[opponent]["ends"]) == (drawn, False)
    for rules in ("strict", "lenient"):
        games = [game.strict if rules == "strict" else game for game in ladder.games]
        rated = ladder.ratings(rules)
        assert rated == rate([(game.white, game.black, game.white_score) for game in games], "x")
        assert [rating.elo for rating in rated.values()] == sorted((r.elo for r in rated.values()), reverse=True)
        assert rated["x"].elo == 0
    table = ladder_table(ladder)
    assert max(map(len, table.splitlines())) <= 105
    assert "x = 0" in table
    assert json.loads(json.dumps(ladder.to_dict(), allow_nan=False))["scale"] == {"x": 0}


@requires_stockfish
def test_the_reproducible_ladder_is_reproducible() -> None:
    def once() -> Ladder:
        with standard_anchors(1) as made:
            return run_ladder(Faulty(3), made, openings=random_openings(1), max_plies=60)  # type: ignore[arg-type]

    with standard_anchors(1) as made:
        assert [player.name for player in made()] == [
            "random", "greedy capture", "Stockfish, 1/2 random", "Stockfish, 1/4 random",
            "Stockfish, 1 node", "Stockfish, 10 nodes", "Stockfish, 100 nodes",
        ]  # fmt: skip
    first = once()
    assert first == once()
    assert (first.anchor, first.settings["engine"].split()[0]) == ("random", "Stockfish")


def rows_against(before: dict[str, Any], ladder: Ladder) -> list[Any]:
    return against([ladder], {("ladder", ""): before})[0]


def test_points_and_elo_against_an_earlier_ladder() -> None:
    """Against itself nothing changes; against one in which every game was lost, everything rises."""
    ladder = ladder_of()
    before = json.loads(json.dumps(ladder.to_dict(), allow_nan=False))
    rows = rows_against(before, ladder)
    assert [row["metric"] for row in rows] == [
        "elo_strict", "elo_lenient", "won_strict", "won_lenient", "strict", "lenient", "repeated_strict",
        "repeated_lenient",
    ]  # fmt: skip
    assert [row["metric"] for row in rows if row["headline"]] == ["won_strict", "won_lenient"], "gains are in wins"
    assert {row["difference"] for row in rows} == {0.0}
    lenient = ladder.matches("lenient")
    points = sum(match["score"] * 6 for match in lenient.values()) / 24
    assert rows[5]["after"] == pytest.approx(points)
    won = sum(match["won"] for match in lenient.values()) / 24
    repeated = sum(match["repeated"] * 6 for match in lenient.values()) / 24
    assert (rows[3]["after"], rows[7]["after"]) == (pytest.approx(won), pytest.approx(repeated))
    for item in before["items"]:
        item["scores"] |= {"strict": 0.0, "lenient": 0.0}
    risen = rows_against(before, ladder)[5]
    assert (risen["before"], risen["difference"], risen["significant"]) == (0, pytest.approx(points), True)
    with pytest.raises(ValueError, match="another scale"):
        rows_against({**before, "scale": {"yy": 0}}, ladder)
    with pytest.raises(ValueError, match="the baseline's 'ladder' is none that this version wrote"):
        rows_against({**before, "games": [{"white": "x"}]}, ladder)


def test_draws_by_repetition_are_points_and_no_wins() -> None:
    """Two games of knights that go to and fro: a point of two, none of it won, and the table says how they ended."""
    moves = ("g1f3", "g8f6", "f3g1", "f6g8") * 2
    games = [
        GameRecord(chess.STARTING_FEN, moves, "1/2-1/2", "threefold repetition", "m", "x"),
        GameRecord(chess.STARTING_FEN, moves, "1/2-1/2", "threefold repetition", "x", "m", first_illegal=1),
        GameRecord(chess.STARTING_FEN, ("f2f3", "e7e5", "g2g4", "d8h4"), "0-1", "checkmate", "x", "m"),
        GameRecord(chess.STARTING_FEN, ("e2e4",), "1/2-1/2", "ply limit", "x", "m"),
    ]
    found = recorded({"max_plies": 8}, "m", "x", games)
    (lenient,), (strict,) = (found.matches(rules).values() for rules in ("lenient", "strict"))
    assert {key: lenient[key] for key in ("won", "drawn", "lost", "repeated")} == {
        "won": 1, "drawn": 3, "lost": 0, "repeated": 0.5
    }  # fmt: skip
    assert (strict["lost"], strict["repeated"]) == (1, 0.25)
    values = {name: each["value"] for name, each in found.estimates().items()}
    assert values == {
        "won_strict": 0.25, "won_lenient": 0.25, "strict": 0.5, "lenient": 0.625, "repeated_strict": 0.25,
        "repeated_lenient": 0.5,
    }  # fmt: skip
    table = ladder_table(found)
    assert "Draws are repetition and 50 moves" in table
    assert "1/3/0    62.5, too few (4)   50" in table


# Two ladders in one fit ----------------------------------------------------------------------------------------------

RESULTS: dict[float, Any] = {1.0: "1-0", 0.5: "1/2-1/2", 0.0: "0-1"}


def games_of(one: str, two: str, points: list[float], moves: str = "") -> list[GameRecord]:
    """Games of these points of the first, each from an opening of its own: kings, and the opening's number."""
    return [
        GameRecord(f"8/8/8/8/8/8/K6k/8 w - - {i} 1", tuple(moves.split()), RESULTS[p], "checkmate", one, two)
        for i, p in enumerate(points)
    ]


def ladder(*games: list[GameRecord], model: str = "m") -> Ladder:
    return recorded({}, model, "random", list(itertools.chain(*games)))


def changes(before: Ladder, after: Ladder) -> list[Comparison]:
    return after.further(after.earlier(json.loads(json.dumps(before.to_dict()))))


def test_a_difference_by_hand() -> None:
    """7.5 and 2.5 of 10 points against the random mover, the models of one name.

    Each has half a virtual draw of its own and a quarter of the random mover's: 7.875 of 10.75, and 2.875.
    """
    better, worse = [1.0] * 7 + [0.5] + [0.0] * 2, [0.0] * 7 + [0.5] + [1.0] * 2
    rows = changes(ladder(games_of("m", "random", worse)), ladder(games_of("random", "m", worse)))
    assert [row["metric"] for row in rows] == ["elo_strict", "elo_lenient"]
    odds = 400 * math.log10(7.875 / 2.875)
    for row in rows:
        assert (row["before"], row["after"]) == (pytest.approx(-odds), pytest.approx(odds))
        assert (row["difference"], row["items"], row["clusters"]) == (pytest.approx(2 * odds), 10, 10)
    fallen = changes(ladder(games_of("m", "random", better)), ladder(games_of("n", "random", worse), model="n"))
    assert fallen[0]["difference"] == pytest.approx(-2 * odds)


def test_an_anchor_has_one_rating_for_both() -> None:
    """A strong anchor draws with the model; only who else it met differs. By fits of their own the model rose by 400.

    On both ladders the model has half of the points against x, who met the random mover in other games each time: won
    all 30 in one, 15 in the other. Strength against x is all that is known of the model, and it is the same.
    """
    half = [0.5] * 30
    before = ladder(games_of("m", "x", half), games_of("x", "random", half))
    after = ladder(games_of("m", "x", half), games_of("x", "random", [1.0] * 30, "e2e4"))
    alone = [each.ratings("lenient")["m"].elo for each in (before, after)]
    assert alone[1] - alone[0] > 400
    (row, _) = changes(before, after)
    assert row["difference"] == pytest.approx(0)
    assert row["before"] == pytest.approx(row["after"])
    # x against the random mover: 45 of 60, and a quarter of the pairing's draws: 60 of x's 120 games, all of random's.
    assert row["before"] == pytest.approx(400 * math.log10((45 + 0.375) / (15 + 0.375)), abs=0.5)


def test_the_anchors_games_count_once_where_they_are_the_same() -> None:
    """One seed plays the same anchors' games on both ladders: they are no news."""
    rng = random.Random(0)
    points = [[rng.choice([0.0, 0.5, 1.0]) for _ in range(20)] for _ in range(3)]
    anchors = games_of("x", "random", points[2])
    before, after = (ladder(games_of("m", "x", own), games_of("random", "m", own), anchors) for own in points[:2])
    once = [(f"m{n}", "x", p) for n in (0, 1) for p in points[n]] + [
        ("random", f"m{n}", p) for n in (0, 1) for p in points[n]
    ]
    expected = rate([*once, *(("x", "random", p) for p in points[2])], "random")
    (row, _) = changes(before, after)
    assert (row["before"], row["after"]) == (pytest.approx(expected["m0"].elo), pytest.approx(expected["m1"].elo))


def test_the_interval_against_a_bootstrap_in_closed_form() -> None:
    """Against one anchor a rating is the odds of the points; both models' games of an opening are drawn together."""
    rng = random.Random(1)
    old, new = ([rng.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(40)] for _ in range(2))
    new = [max(a, b) for a, b in zip(old, new, strict=True)]
    (row, _) = changes(ladder(games_of("m", "random", old)), ladder(games_of("m", "random", new)))

    def elo(points: list[float], drawn: list[int]) -> float:
        won = sum(points[i] for i in drawn) + 0.375
        return 400 * math.log10(won / (40.75 - won))

    differences = []
    for _ in range(20_000):
        drawn = rng.choices(range(40), k=40)
        differences.append(elo(new, drawn) - elo(old, drawn))
    assert row["ci_low"] is not None
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=6)
    assert row["significant"] == (row["ci_low"] > 0)


def test_few_openings_and_lost_games_have_no_verdict() -> None:
    mixed = [0.0, 1.0] * 5
    (few, _) = changes(ladder(games_of("m", "random", mixed[:9])), ladder(games_of("m", "random", [1.0] * 8 + [0.0])))
    assert (few["clusters"], few["ci_low"], few["significant"]) == (9, None, False)
    assert "too few (9)" in comparison_table([few])
    (lost, _) = changes(ladder(games_of("m", "random", [0.0] * 20)), ladder(games_of("m", "random", mixed * 2)))
    assert (lost["clusters"], lost["ci_low"], lost["significant"]) == (20, None, False), "there is a bound alone"
    assert "too few" not in comparison_table([lost])
