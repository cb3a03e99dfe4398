"""Players and the games between them."""

from rookworld_trl.play.games import Game, GameRecord, mirrored, play_games
from rookworld_trl.play.openings import random_opening, random_openings, read_openings
from rookworld_trl.play.players import Choice, EnginePlayer, GreedyCapturePlayer, ModelPlayer, Player, RandomPlayer
from rookworld_trl.play.specs import player

__all__ = [
    "Choice",
    "EnginePlayer",
    "Game",
    "GameRecord",
    "GreedyCapturePlayer",
    "ModelPlayer",
    "Player",
    "RandomPlayer",
    "mirrored",
    "play_games",
    "player",
    "random_opening",
    "random_openings",
    "read_openings",
]
