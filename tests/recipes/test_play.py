"""The recipe that plays matches: every kind of player, the files it writes."""

import io
import json
from pathlib import Path

import chess.pgn
import pytest

from recipes import play as recipe
from recipes.play import main
from tests.support.stockfish import requires_stockfish


def test_the_recipe_plays_a_match(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / "new" / name for name in ("games.pgn", "match.json")}
    options = "--games 2 --max_plies 12 --max_new_tokens 2 --pgn {games.pgn} --output {match.json}"
    words = [str(files.get(word.strip("{}"), word)) for word in options.split()]
    main([str(tiny_checkpoint), "random", "greedy", *words])
    assert " against" in capsys.readouterr().out
    match = json.loads(files["match.json"].read_text())
    assert (match["name"], match["model"], match["scale"]) == ("match", str(tiny_checkpoint), {"random": 0})
    assert len(match["games"]) == 6
    assert all(game["first_illegal"] is not None for game in match["games"][:4]), "its answers do not parse"
    read, file = [], io.StringIO(files["games.pgn"].read_text())
    while game := chess.pgn.read_game(file):
        assert not game.errors
        read.append((game.headers["White"], game.headers["Black"], game.headers["FEN"]))
    assert sorted(read) == sorted((game["white"], game["black"], game["fen"]) for game in match["games"])
    assert len({fen for *_, fen in read}) == 1, "one opening, played with both colours"


@requires_stockfish
def test_stockfish_finds_a_mate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scholars = "r1bqkb1r/pppp1ppp/2n2n2/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR w KQkq - 0 1"
    monkeypatch.setattr(recipe, "random_openings", lambda *_: [scholars])
    written = tmp_path / "match.json"
    main([*["stockfish", "random", "--games", "2", "--max_plies", "1", "--nodes", "50", "--output"], str(written)])
    games = {game["white"]: game for game in json.loads(written.read_text())["games"]}
    assert (games["stockfish"]["moves"], games["stockfish"]["reason"]) == ("h5f7", "checkmate")
