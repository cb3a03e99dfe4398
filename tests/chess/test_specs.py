"""Players by what a user types, and the recipe that plays them."""

import io
import json
from pathlib import Path
from typing import Any

import chess
import chess.pgn
import pytest

from recipes.play import main
from rookworld_trl.chess import players
from rookworld_trl.chess.players import GreedyCapturePlayer, ModelPlayer, RandomPlayer
from rookworld_trl.chess.specs import player, read_spec
from tests.support.stockfish import requires_stockfish


def test_settings_are_read_by_their_types() -> None:
    spec = read_spec("runs/x,move_by=evals,retries=3,top_k=5,temperature=0.5")
    assert spec == ("runs/x", {"move_by": "evals", "retries": 3, "top_k": 5, "temperature": 0.5})
    assert read_spec("stockfish,nodes=10,skill=3,random=0.25")[1] == {"nodes": 10, "skill": 3, "random": 0.25}
    with pytest.raises(ValueError, match="retries must be 0 or more"):
        read_spec("nano,retries=-1")
    with pytest.raises(ValueError, match="'nodes=1' is none of its settings"):
        read_spec("random,nodes=1")


def test_players_are_made_as_typed(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(ModelPlayer, "__init__", lambda self, model, tokenizer, **settings: seen.update(settings))
    with player("random,name=r,seed=3") as one, player("greedy") as two:
        assert (type(one), one.name, type(two), two.name) == (RandomPlayer, "r", GreedyCapturePlayer, "greedy")
    with player(f"{tiny_checkpoint},retries=2,top_k=4,move_by=evals", seed=7):
        assert (seen["retries"], seen["top_k"], seen["move_by"], seen["seed"]) == (2, 4, "evals", 7)


@requires_stockfish
def test_stockfish_by_nodes_skill_and_share_of_random_moves() -> None:
    with player("stockfish,nodes=50") as strong, player("stockfish,depth=1,skill=0,random=1") as weak:
        # Qxf7 mates; the other one's moves are all random.
        board = chess.Board("r1bqkb1r/pppp1ppp/2n2n2/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR w KQkq - 4 4")
        assert strong.choose([board])[0].move == "h5f7"
        assert len({weak.choose([board])[0].move for _ in range(30)}) > 5


def test_the_recipe_plays_a_match(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / "new" / name for name in ("games.pgn", "match.json")}
    players = [f"{tiny_checkpoint},max_new_tokens=2,name=tiny", "random", "greedy"]
    options = ["--games", "2", "--max_plies", "12", "--pgn", str(files["games.pgn"]), "--output"]
    main([*players, *options, str(files["match.json"])])
    assert "tiny against" in capsys.readouterr().out
    match = json.loads(files["match.json"].read_text())
    assert (match["name"], match["scale"], len(match["games"])) == ("match", {"random": 0}, 6)
    assert {"random"} == set(match["moves"]), "its answers do not parse, so that all its moves are fallbacks"
    read, file = [], io.StringIO(files["games.pgn"].read_text())
    while game := chess.pgn.read_game(file):
        assert not game.errors
        read.append((game.headers["White"], game.headers["Black"], game.headers["FEN"]))
    assert sorted(read) == sorted((game["white"], game["black"], game["fen"]) for game in match["games"])
    assert len({fen for *_, fen in read}) == 1, "one opening, played with both colours"


def test_only_retries_are_drawn_from_the_likeliest_tokens(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At `top_k` 1 a sample is the greedy answer, whatever the temperature."""
    real, seen = players.rollout, []

    def rollout(*arguments: Any, **settings: Any) -> Any:
        sampled = real(*arguments, **settings)
        seen.append((settings["temperature"], settings["top_k"], sampled.completion_ids))
        return sampled

    monkeypatch.setattr(players, "rollout", rollout)
    ModelPlayer(tiny_model, tiny_tokenizer, retries=2, top_k=1, max_new_tokens=4).choose([chess.Board()])
    (greedy, none, first), (warm, one, again) = seen
    assert (greedy, none, warm, one) == (0.0, 0, 1.0, 1)
    assert again == first * 2
