"""Self-play as training prompts: positions of the policy's own games take the places of the data set's prompts.

    self_play: {games: 64, plies: 16, batches: 8, per_opening: 8, temperatures: [1.2, 1.0, 0.85, 0.7]}

Every so many batches the policy, as it is by then, plays a generation of games side by side, from positions of the data
set. A position takes the place of a prompt of the same kind only: of the same task, for `P:` of the same phase and as
much in check, for `A:` with the same kind of move. So the shares that the recipe asks for hold in every batch, whatever
the games are like, and where they give too little of a kind (illegal moves: none), the data set's own prompt stays.

The answer of an `A:` prompt follows from the rules. A `P:` prompt needs the value of every legal move: those that the
data set holds for its positions, and where an engine is at hand its own for all others.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import chess
from datasets import Dataset
from transformers import PreTrainedModel

from rookworld_trl.chess import environment, policy, position_key, task_of
from rookworld_trl.chess.dataset import position_number, row_of, split_of
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.play import ModelPlayer, play_games
from rookworld_trl.chess.strata import phase, stratum

PLACE_COLUMN = "place"  # where a prompt of the data set stands in it

Row = dict[str, Any]
Kind = tuple[str, str, bool]


@dataclass(frozen=True)
class SelfPlayOptions:
    """What a recipe writes under `self_play`: all of these keys.

    Attributes:
        games: of a generation.
        plies: of a game, at most.
        batches: of prompts, from one generation to the next.
        per_opening: positions used of the games of a generation that begin from the same position, at most.
        temperatures: that the policy plays at, in one generation after the other; the last one stays.
    """

    games: int
    plies: int
    batches: int
    per_opening: int
    temperatures: list[float]

    def __post_init__(self) -> None:
        whole = [self.games, self.plies, self.batches, self.per_opening]
        temperatures = self.temperatures if isinstance(self.temperatures, list) else []
        if not temperatures or any(type(each) is not int or each < 1 for each in whole):
            raise ValueError(f"{self}: write whole numbers of 1 or more, and a list of `temperatures`")
        if any(type(each) not in (int, float) or each < 0 for each in temperatures):
            raise ValueError(f"`temperatures` is {temperatures}: write numbers of 0 or more")

    def temperature(self, generation: int) -> float:
        return float(self.temperatures[min(generation, len(self.temperatures) - 1)])


def read_options(given: Mapping[str, Any]) -> SelfPlayOptions:
    """Raises:
    ValueError: naming the key.
    """
    try:
        return SelfPlayOptions(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"self_play: {str(error).removeprefix('SelfPlayOptions.__init__() ')}") from error


class Found(NamedTuple):
    """A position of a game: the move played there, those before it, and where the game began."""

    fen: str
    move: str
    history: tuple[str, ...]
    opening: str
    game: str


class SelfPlay:
    """Chooses the prompts of a run, batch by batch; a run that is resumed meets those that it would have met.

    Args:
        dataset: the prompts in whose places positions are put, batch by batch, their places in `PLACE_COLUMN`.
        prompts_per_batch: of them.
        model: the one that trains, which plays with the weights that it has when a generation begins.
        max_new_tokens: of a completion, in games and in training: prompts leave that much room in the context.
        values: gives `P:` rows their values and leaves out those that it cannot value; None: stored values alone.
        held_out: positions (`position_key`) that no prompt may show, beside those of the dev and test splits.

    Attributes:
        rows: prompts of the present generation, by place.
        seen: every position that was used, by `position_number`: none is used twice.
    """

    def __init__(
        self,
        options: SelfPlayOptions,
        dataset: Dataset,
        prompts_per_batch: int,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        seed: int,
        values: Callable[[list[Row]], Iterable[Row]] | None = None,
        held_out: Collection[str] = (),
    ):
        self.options, self.dataset = options, dataset
        self.generation = -1
        self.rows: dict[int, Row] = {}
        self.seen: set[int] = set()
        self._size = options.batches * prompts_per_batch
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._values, self._held_out = values, held_out
        self._starts: dict[str, int] = {}  # distinct prompts, by their first places
        for place, prompt in enumerate(dataset["prompt"]):
            self._starts.setdefault(prompt, place)
        self._stored = {
            position_number(policy.parse_prompt(prompt)): place
            for prompt, place in self._starts.items()
            if task_of(prompt) == "policy"
        }

    def choose(self, rows: list[Row]) -> dict[str, float]:
        """Put the games' prompts in place of those dealt, after playing those that are due; what is to be logged."""
        generation = rows[0][PLACE_COLUMN] // self._size
        if generation != self.generation:
            self._begin(generation)
        share = sum(row[PLACE_COLUMN] in self.rows for row in rows) / len(rows)
        rows[:] = [self.rows.get(row[PLACE_COLUMN], row) for row in rows]
        return {"self_play/share": share, "self_play/temperature": self.options.temperature(generation)}

    def _begin(self, generation: int) -> None:
        rng = random.Random(f"{self._seed}:{generation}")
        first = generation * self._size
        dealt = {row[PLACE_COLUMN]: row for row in self.dataset.select(range(len(self.dataset))[first:][: self._size])}
        places: defaultdict[Kind, list[int]] = defaultdict(list)
        for place, row in dealt.items():
            places[_kind(row["prompt"])].append(place)
        for free in places.values():
            rng.shuffle(free)
        found = self.play(generation, rng)
        rng.shuffle(found)
        rows: list[Row] = []
        used: Counter[str] = Counter()
        for position in found:
            if used[position.opening] < self.options.per_opening and (row := self._row(position, places)) is not None:
                used[position.opening] += 1
                self.seen.add(position_number(position.fen))
                rows.append(dealt[row[PLACE_COLUMN]] | row)
        self.generation = generation
        self.rows = {row[PLACE_COLUMN]: row for row in (self._values(rows) if self._values else rows)}

    def play(self, generation: int, rng: random.Random) -> list[Found]:
        """All positions of a generation's games, one after the other."""
        options, prompts = self.options, list(self._starts)
        player = ModelPlayer(
            self._model,
            self._tokenizer,
            temperature=options.temperature(generation),
            max_new_tokens=self._max_new_tokens,
            seed=rng.getrandbits(31),
        )
        chosen = rng.sample(prompts, len(prompts))
        starts = [_start(chosen[number % len(chosen)]) for number in range(options.games)]
        records = play_games([(player, player, fen) for fen, _ in starts], options.plies)
        found = []
        for number, ((fen, history), record) in enumerate(zip(starts, records, strict=True)):
            board = chess.Board(fen)
            for move in record.moves:
                found.append(Found(board.fen(), move, history, fen, f"self-play {generation}:{number}"))
                board.push_uci(move)
                history = (*history, move)
        return found

    def _row(self, found: Found, places: Mapping[Kind, list[int]]) -> Row | None:
        """The position as a prompt in a free place of its kind, which it takes; None where there is none."""
        number = position_number(found.fen)
        if number in self.seen or self._is_held_out(found.fen):
            return None
        rows: list[tuple[str, str, list[str], list[int]]] = []  # prompt, target, legal moves and their values
        after = environment.transition(found.fen, found.move)
        if not self._is_held_out(after.fen):
            prompt = environment.prompt(found.fen, found.move, found.history)
            rows.append((prompt, environment.format_completion(after), [], []))
        if number in self._stored or self._values is not None:
            stored: Row = self.dataset[self._stored[number]] if number in self._stored else {}
            known = stored.get("target", ""), stored.get("legal_moves", []), stored.get("legal_cp", [])
            rows.append((policy.prompt(found.fen), *known))
        for prompt, target, moves, values in rows:
            kind = _kind(prompt)
            room = self._model.config.n_positions - self._max_new_tokens
            if places.get(kind) and len(self._tokenizer(prompt)["input_ids"]) <= room:
                row = row_of(kind[0], prompt, target, kind[1], moves, values, found.game)
                return row | {PLACE_COLUMN: places[kind].pop()}
        return None

    def _is_held_out(self, fen: str) -> bool:
        return split_of(fen) != "train" or position_key(fen) in self._held_out

    def state_dict(self) -> dict[str, Any]:
        return {"generation": self.generation, "rows": list(self.rows.values()), "seen": sorted(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generation, self.seen = int(state["generation"]), set(state["seen"])
        self.rows = {row[PLACE_COLUMN]: row for row in state["rows"]}


def _start(prompt: str) -> tuple[str, tuple[str, ...]]:
    """The position that a prompt shows and the moves that led to it, as far as it tells them."""
    if task_of(prompt) == "policy":
        return policy.parse_prompt(prompt), ()
    given = environment.parse_prompt(prompt)
    return given.fen, given.history[:-1]


def _kind(prompt: str) -> Kind:
    if task_of(prompt) == "policy":
        board = board_from_fen(policy.parse_prompt(prompt))
        return "policy", phase(board), board.is_check()
    given = environment.parse_prompt(prompt)
    return "environment", stratum(board_from_fen(given.fen), given.move), False
