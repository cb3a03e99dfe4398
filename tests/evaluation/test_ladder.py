"""The ladder and llm_chess's game with players whose every result is known; the recipe that runs them."""

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
from rookworld_trl.evaluation.elo import rate
from rookworld_trl.evaluation.ladder import SCALE_ELO, ladder_table, run_ladder, run_llm_chess, standard_anchors
from rookworld_trl.play import Choice, RandomPlayer
from tests.support.stockfish import requires_stockfish


class Faulty(RandomPlayer):
    """Stands in for a model: random moves, and from the tenth full move on they are fallbacks."""

    name = "faulty"

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.origins: Counter[str] = Counter()

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        origins: list[Any] = ["candidates" if board.fullmove_number >= 10 else "own" for board in boards]
        self.origins.update(origins)
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


def test_who_plays_whom_and_from_where() -> None:
    ladder = run_ladder(Faulty(), anchors, "yy", openings=3, opening_plies=4, max_plies=40, seed=5)  # type: ignore[arg-type]
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
    ladder = run_ladder(Faulty(), anchors, "yy", openings=3, max_plies=40)  # type: ignore[arg-type]
    assert ladder == run_ladder(Faulty(), anchors, "yy", openings=3, max_plies=40)  # type: ignore[arg-type]
    strict, lenient = ladder.matches("strict"), ladder.matches("lenient")
    assert list(strict) == list(lenient) == ["x", "yy", "zzz", "wwww"]
    for opponent in strict:
        games = [game for game in ladder.games if {game.white, game.black} == {"faulty", opponent}]
        early = [game for game in games if game.first_fallback is None]  # over before the tenth move
        assert strict[opponent]["ends"]["lost by illegal move"] == 6 - len(early)
        assert strict[opponent]["won"] + strict[opponent]["drawn"] + strict[opponent]["lost"] == 6
        drawn = sum(game.result == "1/2-1/2" for game in games)
        assert (lenient[opponent]["drawn"], "lost by illegal move" in lenient[opponent]["ends"]) == (drawn, False)
    for rules in ("strict", "lenient"):
        games = [game.strict if rules == "strict" else game for game in ladder.games]
        rated = ladder.ratings(rules)
        assert rated == rate([(game.white, game.black, game.white_score) for game in games], "yy", SCALE_ELO)
        assert [rating.elo for rating in rated.values()] == sorted((r.elo for r in rated.values()), reverse=True)
        assert rated["yy"].elo == 1350
    fallbacks = sum(
        (game.white if number % 2 == 0 else game.black) == "faulty"
        for game in ladder.games
        for number in range(len(game.moves))
        if 4 + number >= 18  # the opening's plies; the tenth full move
    )
    assert ladder.origins["candidates"] == fallbacks
    table = ladder_table(ladder)
    assert max(map(len, table.splitlines())) <= 105
    assert "yy = 1350" in table
    assert json.loads(json.dumps(ladder.to_dict(), allow_nan=False))["scale"] == {"yy": 1350}


def test_a_bound_stands_alone_in_the_table() -> None:
    """A player who lost every game: White by fallback in its first move, Black likewise."""

    class Hopeless(Faulty):
        def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
            return [choice._replace(origin="random") for choice in super().choose(boards)]

    ladder = run_ladder(Hopeless(), anchors, "yy", openings=2, max_plies=8)  # type: ignore[arg-type]
    rating = ladder.ratings("strict")["faulty"]
    line = next(line for line in ladder_table(ladder).splitlines() if line.startswith("  faulty "))
    assert (rating.points, rating.ci_low) == (0.0, None)
    assert line[: 26 + 36].split() == ["faulty", "<", f"{rating.ci_high:.0f}", "0.0"]


def test_void_games_count_nowhere() -> None:
    def some_dead() -> list[Any]:
        return [Named("x"), Named("yy"), Named("dead", dead=True)]

    ladder = run_ladder(Faulty(), some_dead, "yy", openings=1, max_plies=8)  # type: ignore[arg-type]
    assert set(ladder.ratings("lenient")) == {"faulty", "x", "yy"}
    assert "10 games, 6 void" not in ladder_table(ladder)
    assert "12 games, 6 void" in ladder_table(ladder)
    with pytest.raises(ValueError, match="openings must be above 0"):
        run_ladder(Faulty(), anchors, "x", openings=0)  # type: ignore[arg-type]


def test_the_game_of_llm_chess() -> None:
    ladder = run_llm_chess(Faulty(), games=4)  # type: ignore[arg-type]
    assert {(game.white, game.black, game.fen) for game in ladder.games} == {("random", "faulty", chess.STARTING_FEN)}
    assert len({game.moves for game in ladder.games}) == 4
    assert max(len(game.moves) for game in ladder.games) <= 200
    match = ladder.matches("strict")["random"]
    assert (match["lost"], match["score"], match["ends"]) == (4, 0.0, {"lost by illegal move": 4})
    assert all(len(game.strict.moves) == 19 for game in ladder.games)  # nine full moves and White's tenth
    assert ladder.ratings("strict") == {}
    assert json.dumps(ladder.to_dict(), allow_nan=False)
    assert "0/0/4" in ladder_table(ladder)
    with pytest.raises(ValueError, match="games must be above 0"):
        run_llm_chess(Faulty(), games=0)  # type: ignore[arg-type]


@requires_stockfish
def test_the_standard_anchors_stand_in_their_order() -> None:
    """The steps between neighbours that are far apart; 1, 10 and 100 nodes are near each other."""
    with standard_anchors(1) as (make, scale, engine):
        assert (scale, engine.split()[0]) == ("Stockfish, UCI_Elo 1350", "Stockfish")
        names = [player.name for player in make()]
        ladder = run_ladder(Faulty(3), make, scale, openings=2, max_plies=120)  # type: ignore[arg-type]
    assert names == [
        "random", "greedy capture", "Stockfish, 1/2 random", "Stockfish, 1/4 random", "Stockfish, UCI_Elo 1350",
        "Stockfish, 1 node", "Stockfish, 10 nodes", "Stockfish, 100 nodes",
    ]  # fmt: skip
    elo = {name: rating.elo for name, rating in ladder.ratings("lenient").items()}
    assert elo["random"] < elo["Stockfish, 1/4 random"] < 1350 < elo["Stockfish, 100 nodes"]


@pytest.mark.slow
@requires_stockfish
def test_the_recipe_writes_table_json_and_pgn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / "new" / name for name in ("ladder.json", "games.pgn")}
    main(["--suite", "ladder", "--limit", "1", "--output", f"{files['ladder.json']}", "--pgn", f"{files['games.pgn']}"])
    printed = capsys.readouterr().out
    assert "rookworld-nano against" in printed
    assert "engine=Stockfish" in printed
    (suite,) = json.loads(files["ladder.json"].read_text())["suites"]
    assert (suite["suite"], len(suite["games"]), suite["scale"]) == ("ladder", 42, {"Stockfish, UCI_Elo 1350": 1350})
    read, file = [], io.StringIO(files["games.pgn"].read_text())
    while game := chess.pgn.read_game(file):
        assert not game.errors
        read.append(" ".join(move.uci() for move in game.mainline_moves()))
    assert read == [game["moves"] for game in suite["games"]]


def test_the_recipe_plays_llm_chess_without_an_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCKFISH_PATH", "/no/engine")
    main(["--suite", "llm_chess", "--limit", "1", "--move_by", "evals", "--output", str(tmp_path / "out.json")])
    assert "llm_chess, 1 games" in capsys.readouterr().out
    (suite,) = json.loads((tmp_path / "out.json").read_text())["suites"]
    assert (suite["retries"], suite["move_by"], len(suite["games"])) == (2, "evals", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "ladder"], "engine '/no/engine' was not found"),
        (["--pgn", "games.pgn"], "--pgn says how games are played; leave it out with --suite held_out"),
        (["--suite", "ladder", "--dataset", "x.pgn"], "--suite ladder takes no --dataset"),
        (["--suite", "llm_chess", "--retries", "-1"], "--retries must be 0 or more; got -1"),
        (["--suite", "llm_chess", "--pgn", "."], "--pgn . is a folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCKFISH_PATH", "/no/engine")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
