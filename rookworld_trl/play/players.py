"""Who can play: a model, an engine, a random mover. One method each, for many boards at a time."""

import random
from collections.abc import Sequence
from typing import Any, Protocol

import chess
from transformers import PreTrainedModel

from rookworld_trl.engine import Engine
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.tokens import completion_texts
from rookworld_trl.tasks import ParseError, policy


class Player(Protocol):
    """Chooses moves."""

    name: str

    def choose(self, boards: Sequence[chess.Board]) -> list[str | None]:
        """The move for each board, in UCI. Boards are not changed, and none of them is a finished game.

        The text may be no legal move; that loses the game. None says that the player could not be asked, through
        no fault of its chess (an engine that died twice); that voids the game.
        """
        ...


class RandomPlayer:
    """Plays any legal move, all equally likely."""

    def __init__(self, seed: int = 0):
        self.name = "random"
        self._rng = random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[str | None]:
        return [self._rng.choice([move.uci() for move in board.legal_moves]) for board in boards]


class EnginePlayer:
    """Plays an engine's best move. How strong it is, the engine's nodes or depth decide.

    Args:
        engine: running, that is inside its `with` block; it may serve several players.
    """

    def __init__(self, engine: Engine, name: str = "stockfish"):
        self.name = name
        self._engine = engine

    def choose(self, boards: Sequence[chess.Board]) -> list[str | None]:
        chosen: list[str | None] = []
        for board in boards:
            values = self._engine.analyse(board, multipv=1)
            chosen.append(values[0].move if values else None)
        return chosen


class ModelPlayer:
    """Plays `B:` of a model's `P:` completion; a completion that does not parse is an empty text.

    Args:
        model: transformers `GPT2LMHeadModel`.
        temperature: 0 for greedy, which plays equal positions equally.
        max_new_tokens: at most; less where the prompt leaves less of the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 80,
        batch_size: int = 64,
        seed: int = 0,
        name: str = "model",
    ):
        self.name = name
        self._model, self._tokenizer = model, tokenizer
        self._temperature, self._max_new_tokens, self._batch_size = temperature, max_new_tokens, batch_size
        self._rng = random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[str | None]:
        return ["" if answer is None else answer.best for answer in self.answers(boards)]

    def answers(self, boards: Sequence[chess.Board]) -> list[policy.PolicyOutput | None]:
        """The whole answer for each board; None where the completion does not parse."""
        prompt_ids = self._tokenizer([policy.prompt(board.fen()) for board in boards])["input_ids"]
        room = self._model.config.n_positions - max(map(len, prompt_ids))
        sampled = rollout(
            self._model,
            prompt_ids,
            max_new_tokens=min(self._max_new_tokens, max(room, 1)),
            eos_token_id=self._tokenizer.eos_token_id,
            temperature=self._temperature,
            seed=self._rng.getrandbits(31),  # a new one each time: a position met again is sampled anew
            batch_size=self._batch_size,
        )
        return [_parsed(text) for text in completion_texts(self._tokenizer, sampled.completion_ids)]


def _parsed(completion: str) -> policy.PolicyOutput | None:
    try:
        return policy.parse(completion)
    except ParseError:
        return None
