"""The ladder with players whose every result is known; the recipe that runs them."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chess
import chess.pgn
import pytest

from recipes.evaluate import main
from rookworld_trl.chess.ladder import Ladder, ladder_table, run_ladder, standard_anchors
from rookworld_trl.chess.ladder import ladder_of as recorded
from rookworld_trl.chess.play import Choice, GameRecord, RandomPlayer, random_openings
from rookworld_trl.measuring import against
from rookworld_trl.measuring.elo import rate
from tests.support.stockfish import requires_stockfish


class Faulty(RandomPlayer):
    """Stands in for a model: random moves, and from the tenth full move on they are fallbacks."""

    name = "faulty"

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        origins: list[Any] = ["candidates" if board.fullmove_number >= 10 else "own" for board in boards]
        return [choice._replace(origin=origin) for choice, origin in zip(super().choose(boards), origins, strict=True)]


class Named(RandomPlayer):
    """A random mover by another name; records the positions it begins from."""

    def __init__(self, name: str, dead: bool = False):
        super().__init__(len(name))
        self.name, self.dead = name, dead

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return [Choice(None)] * len(boards) if self.dead else super().choose(boards)


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
    assert "1/3/0   62.5   too few (4)   50" in table


@requires_stockfish
def test_the_recipe_writes_table_json_and_pgn(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--model", str(tiny_checkpoint), "--max_new_tokens", "2"]
    files = {name: tmp_path / "new" / name for name in ("ladder.json", "games.pgn")}
    written = ["--output", f"{files['ladder.json']}", "--pgn", f"{files['games.pgn']}"]
    main([*tiny, "--suite", "ladder", "--games", "2", *written])
    printed = capsys.readouterr().out
    assert "tiny-checkpoint against" in printed
    assert "engine=Stockfish" in printed
    (suite,) = json.loads(files["ladder.json"].read_text())["models"][0]["results"]
    assert (suite["name"], len(suite["games"]), suite["scale"]) == ("ladder", 2 * (7 + 6 + 5), {"random": 0})
    assert "| ladder | Elo, strict rules (random = 0) | greedy |" in (tmp_path / "new" / "ladder.md").read_text()
    read, file = [], io.StringIO(files["games.pgn"].read_text())
    while game := chess.pgn.read_game(file):
        assert not game.errors
        read.append(" ".join(move.uci() for move in game.mainline_moves()))
    assert read == [game["moves"] for game in suite["games"]]
