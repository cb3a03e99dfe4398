"""Players by what a user types: a kind or a model, then settings behind commas.

random                                      greedy
stockfish,nodes=100                         stockfish,depth=3,skill=2        stockfish,nodes=1,random=0.5
nano                                        runs/demo/checkpoint,move_by=evals,retries=3,top_k=5,temperature=0.5
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.players import EnginePlayer, GreedyCapturePlayer, ModelPlayer, Player, RandomPlayer
from rookworld_trl.modeling.loading import load

Settings = dict[str, Any]

_COMMON: dict[str, Callable[[str], Any]] = {"name": str, "seed": int}
_SETTINGS: dict[str, dict[str, Callable[[str], Any]]] = {
    "random": _COMMON,
    "greedy": _COMMON,
    "stockfish": {**_COMMON, "nodes": int, "depth": int, "skill": int, "elo": int, "random": float},
    "model": {
        **_COMMON,
        "move_by": str,
        "retries": int,
        "top_k": int,
        "temperature": float,
        "max_new_tokens": int,
        "revision": str,
    },
}


def read_spec(text: str) -> tuple[str, Settings]:
    """What a user typed, as the kind or the model's name, and the settings.

    Raises:
        ValueError: naming the setting that does not exist or cannot be read, and those that there are.
    """
    what, *words = text.split(",")
    known = _SETTINGS.get(what, _SETTINGS["model"])
    settings: Settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"player '{text}': '{word}' is none of its settings; write {', '.join(known)}, as key=value"
            )
        try:
            settings[key] = known[key](value)
        except ValueError as error:
            raise ValueError(f"player '{text}': {key} is '{value}' ({error})") from error
    if settings.get("move_by") not in (None, "best", "evals"):
        raise ValueError(f"player '{text}': move_by is '{settings['move_by']}'; write best or evals")
    for key in ("retries", "top_k", "temperature", "nodes", "depth"):
        if settings.get(key, 0) < 0:
            raise ValueError(f"player '{text}': {key} must be 0 or more")
    return what, settings


@contextmanager
def player(text: str, *, device: str = "cpu", seed: int = 0, batch_size: int = 64) -> Iterator[Player]:
    """The player that a user typed, its engine running and its model loaded.

    A model plays by `B:` (`move_by=best`) or its highest eval (`evals`), greedily unless it has a temperature; an
    illegal move is sampled again `retries` times, from the `top_k` likeliest tokens. Stockfish searches 1,000 nodes
    unless told otherwise; `skill` (0 to 20) and `elo` are its own limits of strength.

    Raises:
        ValueError: as in `read_spec`, or the model cannot be loaded.
        FileNotFoundError: there is no Stockfish.
    """
    what, settings = read_spec(text)
    name, seed = settings.pop("name", text), settings.pop("seed", seed)
    made: Player
    if what in ("random", "greedy"):
        made = RandomPlayer(seed) if what == "random" else GreedyCapturePlayer(seed)
        made.name = name
        yield made
    elif what == "stockfish":
        options: dict[str, str | int | bool] = {}
        if "skill" in settings:
            options["Skill Level"] = settings["skill"]
        if "elo" in settings:
            options |= {"UCI_LimitStrength": True, "UCI_Elo": settings["elo"]}
        nodes = settings.get("nodes", None if "depth" in settings else 1000)
        with Engine(nodes=nodes, depth=settings.get("depth"), hash_mb=1, options=options) as engine:
            yield EnginePlayer(engine, name, settings.get("random", 0.0), seed)
    else:
        model, tokenizer = load(what, revision=settings.pop("revision", None))
        yield ModelPlayer(model.to(device), tokenizer, name=name, seed=seed, batch_size=batch_size, **settings)
