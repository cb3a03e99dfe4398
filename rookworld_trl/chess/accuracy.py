"""Held-out accuracy of both tasks: generate, score each item as training would, keep every item's result.

Keeping the items is what makes a before/after comparison paired, and a doubtful number open to a look.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rookworld_trl.chess import PREFIXES, ParseError, TaskName, environment, policy, task_of
from rookworld_trl.chess.completions import Completion, complete, fitting_length
from rookworld_trl.chess.rewards import score_environment_rows, score_policy_rows
from rookworld_trl.chess.rewards.moves import move_values
from rookworld_trl.chess.trivial import Baselines, baseline_scores, baselines
from rookworld_trl.files import write_atomically
from rookworld_trl.measuring.metrics import METRICS, Estimate, estimate, numeric

MODES = ("greedy", "sampled")
COLUMNS = ("prompt", "task", "target", "legal_moves", "legal_cp", "stratum")
MAX_REFERENCES = 10_000  # about 300 bytes each


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt's result in one mode.

    Attributes:
        key: hash of the prompt and of what it is scored against; equal keys make items of two evaluations comparable.
        scores: every field of the scorer as a number, `tokens`, `finished` (the end token was written), and what
            trivial players get on the same row (`baseline_scores`).
        game: what the position was taken from; items of one game are resampled together. "" if not known.
    """

    key: str
    mode: str
    task: TaskName
    stratum: str
    color: str
    prompt: str
    completion: str
    scores: dict[str, float]
    game: str = ""

    @property
    def stake(self) -> str:
        """Whether the choice of a move makes a difference, of more than one point of win chance; "" for `A:`."""
        return "" if self.task == "environment" else "something" if self.scores["at_stake"] else "nothing"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of all items, and what they were made with.

    Attributes:
        settings: temperature, max_new_tokens, task_sampling: what two evaluations must share to be compared; seed.
        items: mode-major, in the data set's order.
        seconds: wall time of each mode.
        references: by key, what a report draws beside an item's completion: of an `A:` item the right answer, of a
            `P:` item the value of each legal move, 1 minus the win chance it gives away. Of the first
            `MAX_REFERENCES` items.
    """

    settings: dict[str, Any]
    items: list[Item]
    seconds: dict[str, float] = field(default_factory=dict)
    references: dict[str, str | dict[str, float]] = field(default_factory=dict)

    def select(self, task: TaskName, mode: str, **having: str) -> list[Item]:
        """The items of a task and mode; `stratum`, `color` and `stake` narrow it further."""
        return [
            item
            for item in self.items
            if item.task == task and item.mode == mode and all(getattr(item, k) == v for k, v in having.items())
        ]

    def tasks_and_modes(self) -> list[tuple[TaskName, str]]:
        """The pairs that have items, policy first, greedy first."""
        present = {(item.task, item.mode) for item in self.items}
        return [(task, mode) for task in METRICS for mode in MODES if (task, mode) in present]

    def estimates(self, task: TaskName, mode: str, **having: str) -> dict[str, Estimate]:
        """Every metric of a task with its 95 % interval, over all items or over a stratum, colour or stake.

        Raises:
            ValueError: no such items.
        """
        items = self.select(task, mode, **having)
        if not items:
            raise ValueError(f"no items of task '{task}', mode '{mode}' {having or ''}".rstrip())
        return estimate([item.scores for item in items], METRICS[task], [item.game for item in items])

    def baselines(self, task: TaskName, mode: str, **having: str) -> Baselines:
        """What trivial players get on the same items, by metric and player."""
        return baselines(task, [item.scores for item in self.select(task, mode, **having)])

    def groups(self, task: TaskName) -> list[tuple[str, str]]:
        """(field, value) of each colour, stake and stratum that occurs, for `estimates(..., **{field: value})`."""
        items = [item for item in self.items if item.task == task]
        names = ("color", "stake", "stratum")
        return [(name, value) for name in names for value in _distinct(getattr(i, name) for i in items)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, seconds, all estimates (`groups` keyed `color=white`, `stratum=mate`), the items."""
        metrics = [
            {
                "task": task,
                "mode": mode,
                "items": len(self.select(task, mode)),
                "metrics": self.estimates(task, mode),
                "baselines": self.baselines(task, mode),
                "groups": {
                    f"{name}={value}": {
                        "items": len(self.select(task, mode, **{name: value})),
                        "metrics": self.estimates(task, mode, **{name: value}),
                        "baselines": self.baselines(task, mode, **{name: value}),
                    }
                    for name, value in self.groups(task)
                },
            }
            for task, mode in self.tasks_and_modes()
        ]
        return {
            "settings": self.settings,
            "seconds": self.seconds,
            "metrics": metrics,
            "items": [asdict(item) for item in self.items],
            "references": self.references,
        }

    def write(self, path: Path) -> None:
        """Write `to_dict` as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict()) + "\n")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Evaluation":
        """Read what `to_dict` wrote; the estimates are computed again from the items.

        Raises:
            ValueError: a part is missing or has unknown fields, or an older version wrote it.
        """
        try:
            items = [Item(**item) for item in data["items"]]
            evaluation = cls(
                dict(data["settings"]), items, dict(data.get("seconds", {})), dict(data.get("references", {}))
            )
            older = any(not {"at_stake", "copy.exact"} & set(item.scores) for item in items)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no evaluation written by recipes/evaluate.py: {error}") from error
        if older:
            raise ValueError("an older version wrote this evaluation, without the trivial players; evaluate again")
        return evaluation


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    modes: Sequence[str] = MODES,
    temperature: float = 1.0,
    max_new_tokens: int,
    task_sampling: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Complete every prompt in each mode and score the completions.

    Args:
        model: a GPT-2 that `rollout` accepts.
        tokenizer: with an end token.
        dataset: rows with the columns `COLUMNS`.
        modes: of "greedy" and "sampled"; sampled means one sample a prompt at `temperature`.
        max_new_tokens: a completion that has not ended by then is scored as it stands. Cut, for all rows alike, to
            what the model's context leaves behind the longest prompt.
        task_sampling: by task, its own `temperature` of the sampled mode and `max_completion_length` of both, as the
            trainer has them.
        batch_size: prompts decoded at a time; changes speed and memory, not the results.
        progress: show a bar.

    Raises:
        ValueError: no rows, a missing column, a malformed row, an unknown mode, a tokenizer without an end token, or
            a prompt that fills the model's context.
    """
    rows = list(dataset)
    _check(rows, modes)
    prompts = [row["prompt"] for row in rows]
    max_new_tokens = fitting_length(model, tokenizer, prompts, max_new_tokens)
    items: list[Item] = []
    seconds = {}
    for mode in modes:
        start = time.perf_counter()
        completions: dict[int, Completion] = {}
        for task in METRICS:
            own, mine = (task_sampling or {}).get(task, {}), [i for i, row in enumerate(rows) if row["task"] == task]
            texts = complete(
                model,
                tokenizer,
                [prompts[i] for i in mine],
                temperature=own.get("temperature", temperature) if mode == "sampled" else 0.0,
                max_new_tokens=min(max_new_tokens, own.get("max_completion_length", max_new_tokens)),
                batch_size=batch_size,
                seed=seed,
                progress=f"evaluate {PREFIXES[task].strip()} {mode}" if progress else "",
            )
            completions |= dict(zip(mine, texts, strict=True))
        scored = score(rows, [completions[i].text for i in range(len(rows))], mode)
        for i, item in enumerate(scored):
            item.scores.update(tokens=float(completions[i].tokens), finished=float(completions[i].finished))
        items += scored
        seconds[mode] = time.perf_counter() - start
    settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    if task_sampling:
        settings["task_sampling"] = {task: dict(own) for task, own in task_sampling.items()}
    return Evaluation(settings, items, seconds, {item_key(row): reference_of(row) for row in rows[:MAX_REFERENCES]})


def score(rows: Sequence[Mapping[str, Any]], completions: Sequence[str], mode: str = "greedy") -> list[Item]:
    """Score given completions of the rows, with the scorers that training rewards.

    `tokens` and `finished` are not known from the text: they are 0 and 1 here, and `evaluate` fills them in.

    Raises:
        ValueError: a row is malformed.
    """
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    prompts = columns.pop("prompt")
    of_policy = score_policy_rows(prompts, list(completions), **columns)
    of_environment = score_environment_rows(prompts, list(completions), **columns)
    items = []
    for row, completion, p, a in zip(rows, completions, of_policy, of_environment, strict=True):
        scores = {**numeric(p if p is not None else a), "tokens": 0.0, "finished": 1.0, **baseline_scores(row)}
        prompt, game = row["prompt"], row.get("game") or ""
        about = (task_of(prompt), row["stratum"], _color(prompt))
        items.append(Item(item_key(row), mode, *about, prompt, completion, scores, game))
    return items


def _check(rows: Sequence[Mapping[str, Any]], modes: Sequence[str]) -> None:
    if not rows:
        raise ValueError("the data set has no rows")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"unknown mode {unknown}; choose of {MODES}")
    for i, row in enumerate(rows):
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"row {i} of the data set lacks the columns {missing}; needed are {COLUMNS}")
        if not isinstance(row["prompt"], str):
            raise ValueError(f"row {i} of the data set, column 'prompt': expected text, found {row['prompt']!r}")
        try:
            task = task_of(row["prompt"])
            (policy if task == "policy" else environment).parse_prompt(row["prompt"])
        except ParseError as error:
            raise ValueError(f"row {i} of the data set, column 'prompt': {error}") from error
        if row["task"] != task:
            raise ValueError(f"row {i} of the data set: column 'task' says {row['task']!r}, the prompt is of '{task}'")


def item_key(row: Mapping[str, Any]) -> str:
    """What tells an item from others: a hash of its prompt and of what it is scored against."""
    reference = [row[name] for name in ("prompt", "target", "legal_moves", "legal_cp")]
    return hashlib.sha256(json.dumps(reference).encode()).hexdigest()[:16]


def reference_of(row: Mapping[str, Any]) -> str | dict[str, float]:
    """What a report draws beside the completion; see `Evaluation.references`."""
    if row["task"] == "environment":
        return row["target"]
    values = move_values(row["legal_cp"])
    return {move: round(value, 3) for move, value in zip(row["legal_moves"], values, strict=True)}


def _color(prompt: str) -> str:
    """Who is to move in the prompt's position."""
    fen = prompt.split(" ", 1)[1]
    return "white" if fen.split(" ")[1] == "w" else "black"


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})
