"""Who can play: a model, an engine, a random mover, a greedy capturer. One method each, for many boards at a time."""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import chess
from transformers import PreTrainedModel

from rookworld_trl.chess import ParseError, policy
from rookworld_trl.chess.engine import Engine
from rookworld_trl.chess.material import material_won
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.tokens import completion_texts

RETRY_TEMPERATURE = 1.0  # a greedy model would write its illegal move again


class Choice(NamedTuple):
    """A player's move.

    Attributes:
        move: UCI. An illegal one loses the game. None says that the player could not be asked, through no fault of its
            chess (an engine that died twice); that voids the game.
        origin: `own`; or, after an own move that was illegal, where this one comes from: `retries` (sampled again),
            `candidates` (the first legal one of the model's list, its highest eval first), `random`.
        answer: the model's first answer; None where it does not parse, and for other players.
    """

    move: str | None
    origin: Literal["own", "retries", "candidates", "random"] = "own"
    answer: policy.PolicyOutput | None = None

    @property
    def is_fallback(self) -> bool:
        """Another move than the player's own, played because that was illegal."""
        return self.origin in ("candidates", "random")


class Player(Protocol):
    """Chooses moves."""

    name: str

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        """The move for each board. Boards are not changed, and none of them is a finished game."""
        ...


class RandomPlayer:
    """Plays any legal move, all equally likely."""

    name = "random"

    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return [Choice(self._rng.choice(self._moves(board)).uci()) for board in boards]

    def _moves(self, board: chess.Board) -> list[chess.Move]:
        return list(board.legal_moves)


class GreedyCapturePlayer(RandomPlayer):
    """Plays the move that wins most material in one ply, promotions included; any of them where several do."""

    name = "greedy capture"

    def _moves(self, board: chess.Board) -> list[chess.Move]:
        won = {move: material_won(board, move) for move in board.legal_moves}
        return [move for move in won if won[move] == max(won.values())]


class EnginePlayer:
    """Plays an engine's move. How strong it is, the engine's nodes decide.

    Args:
        engine: running, that is inside its `with` block; it may serve several players.
        random_share: how many of its moves are random ones instead: a player between two kinds.
    """

    def __init__(self, engine: Engine, name: str = "stockfish", random_share: float = 0.0, seed: int = 0):
        self.name = name
        self._engine, self._random_share = engine, random_share
        self._rng = random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return [Choice(self._move(board)) for board in boards]

    def _move(self, board: chess.Board) -> str | None:
        if self._rng.random() < self._random_share:
            return self._rng.choice(list(board.legal_moves)).uci()
        return self._engine.play(board)


class ModelPlayer:
    """Plays a model's `P:` completion, and never an illegal move: where its own is one, it falls back (see `Choice`).

    Args:
        model: transformers `GPT2LMHeadModel`.
        move_by: its own move is `B:`, or the candidate with the highest of its evals (the first of equals).
        temperature: 0 for greedy, which plays equal positions equally.
        retries: how often an illegal move is sampled again, at temperature 1, before falling back.
        max_new_tokens: at most; less where the prompt leaves less of the model's context.
        seed: seeds the samples; a random fallback follows from it and the position.

    Attributes:
        origins: moves played, by `Choice.origin`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        move_by: Literal["best", "evals"] = "best",
        temperature: float = 0.0,
        retries: int = 0,
        max_new_tokens: int = 80,
        batch_size: int = 64,
        seed: int = 0,
        name: str = "model",
    ):
        self.name = name
        self.origins: Counter[str] = Counter()
        self._model, self._tokenizer = model, tokenizer
        self._move_by, self._temperature, self._retries = move_by, temperature, retries
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._seed, self._rng = seed, random.Random(seed)

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        return self.choose_among(boards, [{move.uci() for move in board.legal_moves} for board in boards])

    def choose_among(self, boards: Sequence[chess.Board], legal: Sequence[Collection[str]]) -> list[Choice]:
        """The move for each board, one of those that count as legal there (one or more, in UCI)."""
        answers = self._answers(boards, self._temperature)
        again = [i for i, answer in enumerate(answers) if self._own(answer) not in legal[i]] if self._retries else []
        again_boards = [boards[i] for i in again for _ in range(self._retries)]
        samples = self._answers(again_boards, RETRY_TEMPERATURE)
        retried = {i: samples[n * self._retries :][: self._retries] for n, i in enumerate(again)}
        choices = [
            self._choice(board, answer, retried.get(i, []), legal[i])
            for i, (board, answer) in enumerate(zip(boards, answers, strict=True))
        ]
        self.origins.update(choice.origin for choice in choices)
        return choices

    def _choice(
        self,
        board: chess.Board,
        answer: policy.PolicyOutput | None,
        retried: Sequence[policy.PolicyOutput | None],
        legal: Collection[str],
    ) -> Choice:
        if (own := self._own(answer)) in legal:
            return Choice(own, "own", answer)
        for sampled in retried:
            if (own := self._own(sampled)) in legal:
                return Choice(own, "retries", answer)
        for move, _ in by_eval(answer):
            if move in legal:
                return Choice(move, "candidates", answer)
        return Choice(random.Random(f"{self._seed} {board.fen()}").choice(sorted(legal)), "random", answer)

    def _own(self, answer: policy.PolicyOutput | None) -> str:
        if answer is None:
            return ""
        return answer.best if self._move_by == "best" else next((move for move, _ in by_eval(answer)), "")

    def _answers(self, boards: Sequence[chess.Board], temperature: float) -> list[policy.PolicyOutput | None]:
        """The whole answer for each board; None where the completion does not parse."""
        if not boards:
            return []
        prompt_ids = self._tokenizer([policy.prompt(board.fen()) for board in boards])["input_ids"]
        room = self._model.config.n_positions - max(map(len, prompt_ids))
        sampled = rollout(
            self._model,
            prompt_ids,
            max_new_tokens=min(self._max_new_tokens, max(room, 1)),
            eos_token_id=self._tokenizer.eos_token_id,
            temperature=temperature,
            seed=self._rng.getrandbits(31),  # a new one each time: a position met again gets another sample
            batch_size=self._batch_size,
        )
        return [_parsed(text) for text in completion_texts(self._tokenizer, sampled.completion_ids)]


def _parsed(completion: str) -> policy.PolicyOutput | None:
    try:
        return policy.parse(completion)
    except ParseError:
        return None


def by_eval(answer: policy.PolicyOutput | None) -> list[tuple[str, float]]:
    """Candidates with an eval each, the highest first, equal ones as they were listed."""
    if answer is None:
        return []
    return sorted(zip(answer.moves, answer.evals, strict=False), key=lambda pair: -pair[1])
