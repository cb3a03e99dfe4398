"""What the position suites share: asking the model for a move, results item by item, their table."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import chess
from transformers import PreTrainedModel

from rookworld_trl.evaluation.baselines import PLAYERS, most_material
from rookworld_trl.evaluation.completions import complete, fitting_length
from rookworld_trl.evaluation.metrics import Estimate, Metric, Term, estimate
from rookworld_trl.evaluation.tables import metric_row
from rookworld_trl.tasks import ParseError, policy


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One position's or game's result.

    Attributes:
        name: the item's id in its file.
        group: what the suite files it under: a theme, a reason, or empty.
        scores: numbers that the suite's metrics are made of.
    """

    name: str
    group: str
    prompt: str
    completion: str
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """A suite's results. `metrics[0]` is its headline."""

    name: str
    settings: dict[str, Any]
    metrics: Sequence[Metric]
    items: list[SuiteItem]

    def estimates(self, group: str | None = None) -> dict[str, Estimate]:
        """Every metric with its 95 % interval, over all items or over one group.

        Raises:
            ValueError: no such items.
        """
        scores = [item.scores for item in self.items if group in (None, item.group)]
        if not scores:
            raise ValueError(f"suite '{self.name}' has no items{f' of group {group!r}' if group else ''}")
        return estimate(scores, self.metrics)

    def groups(self) -> dict[str, int]:
        """Items per group, sorted; empty where the suite has no groups."""
        return {name: n for name, n in sorted(Counter(item.group for item in self.items).items()) if name}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, estimates over all items and by group, the items."""
        return {
            "suite": self.name,
            "settings": self.settings,
            "metrics": self.estimates(),
            "groups": {name: {"items": n, "metrics": self.estimates(name)} for name, n in self.groups().items()},
            "items": [asdict(item) for item in self.items],
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a `P:` prompt; `move` and `candidates` are legal ones only, `move` None if `B:` is not."""

    prompt: str
    completion: str
    parsed: bool
    move: chess.Move | None
    candidates: tuple[chess.Move, ...]


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    boards: Sequence[chess.Board],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    progress: str = "",
) -> list[Answer]:
    """Ask the model for its move in each position. Arguments and errors as in `complete`."""
    prompts = [policy.prompt(board.fen()) for board in boards]
    completions = complete(
        model,
        tokenizer,
        prompts,
        temperature=temperature,
        max_new_tokens=fitting_length(model, tokenizer, prompts, max_new_tokens) if prompts else max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    texts = [completion.text for completion in completions]
    return [read_answer(board, prompt, text) for board, prompt, text in zip(boards, prompts, texts, strict=True)]


def read_answer(board: chess.Board, prompt: str, completion: str) -> Answer:
    """Parse a `P:` completion against its position."""
    try:
        output = policy.parse(completion)
    except ParseError:
        return Answer(prompt, completion, False, None, ())
    legal = {move.uci(): move for move in board.legal_moves}
    candidates = tuple(legal[uci] for uci in output.moves if uci in legal)
    return Answer(prompt, completion, True, legal.get(output.best), candidates)


def trivial_scores(board: chess.Board, worth: Callable[[chess.Move], float]) -> dict[str, float]:
    """What trivial players get in a position, the random legal mover on average."""
    worths = {move.uci(): worth(move) for move in board.legal_moves}
    return {
        "random": sum(worths.values()) / len(worths),
        "first": worths[min(worths)],
        "material": worths[most_material(board.fen(), list(worths))],
    }


def trivial_metrics(label: str, full: float = 1.0) -> list[Metric]:
    """Metrics of `trivial_scores`, as shares of what a position is worth."""

    def of(player: str) -> Term:
        return lambda scores: scores[player]

    return [
        Metric(player, f"{label}: {name}", of(player), lambda scores: full, proportion=False)
        for player, name in PLAYERS["policy"].items()
    ]


def suite_table(result: SuiteResult) -> str:
    """The suite's metrics, then its headline by group."""
    title = f"{result.name}, {len(result.items)} items"
    settings = ", ".join(f"{name}={value}" for name, value in result.settings.items())
    estimates = result.estimates()
    lines = [title, f"  {settings}", *(metric_row(m.label, estimates[m.name], m.format) for m in result.metrics)]
    head = result.metrics[0]
    if groups := result.groups():
        lines += ["", f"  {head.label}, by group"]
        lines += [
            metric_row(f"  {name[:36]:36} {count:5}", result.estimates(name)[head.name], head.format)
            for name, count in groups.items()
        ]
    return "\n".join(lines)
