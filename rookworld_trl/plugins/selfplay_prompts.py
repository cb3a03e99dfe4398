"""Prompts from games that the policy plays against itself, as it is when a generation of games begins."""

from typing import Any, Protocol

from rookworld_trl.checkpointing.store import Stateful
from rookworld_trl.training.plugin import Plugin, Row


class Games(Stateful, Protocol):
    """Plays them, such as `rookworld_trl.chess.own_games.SelfPlay`."""

    def choose(self, rows: list[Row]) -> dict[str, float]:
        """Put this batch's prompts in place of those dealt, and return what is to be logged."""
        ...


class SelfPlayPrompts(Plugin):
    """Hands each batch's rows to `games`."""

    NAME = "self_play"
    STATE = "stages"
    SOURCE = True

    def __init__(self, games: Games):
        self.games = games

    def rows(self, rows: list[Row]) -> None:
        for name, value in self.games.choose(rows).items():
            self.trainer.record(name, value)

    def state_dict(self) -> dict[str, Any]:
        return self.games.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.games.load_state_dict(state)
