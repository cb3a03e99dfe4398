"""What all suites share: how a model is asked, results item by item, and their table.

A suite is a function of a way to ask (`Ask`: prompts in, completions out) and of what it measures on; it returns a
`SuiteResult`. `ModelAnswers` asks a model; what trivial players answer is a plain function.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from rookworld_trl.chess import task_of
from rookworld_trl.chess.completions import complete, fitting_length
from rookworld_trl.chess.trivial import Baselines
from rookworld_trl.measuring.intervals import ratios
from rookworld_trl.measuring.metrics import Estimate, Metric, estimate, terms

Ask = Callable[[Sequence[str], str], list[str]]  # prompts of one task, and the title of a progress bar


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """Asks a model, one completion a prompt; an `Ask`.

    Attributes:
        temperature: by task; 0 for greedy.
        max_new_tokens: at most; less where the prompts leave less of the model's context.
        batch_size: prompts decoded at a time. Equal prompts get different samples only within one batch.
    """

    model: PreTrainedModel
    tokenizer: Any
    temperature: Mapping[str, float]
    max_new_tokens: int
    batch_size: int = 64
    seed: int = 0
    progress: bool = False

    def __call__(self, prompts: Sequence[str], title: str) -> list[str]:
        """The completions' texts. Errors as in `complete`."""
        if not prompts:
            return []
        completions = complete(
            self.model,
            self.tokenizer,
            prompts,
            temperature=self.temperature[task_of(prompts[0])],
            max_new_tokens=fitting_length(self.model, self.tokenizer, prompts, self.max_new_tokens),
            batch_size=self.batch_size,
            seed=self.seed,
            progress=title if self.progress else "",
        )
        return [completion.text for completion in completions]


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One problem's or game's result.

    Attributes:
        name: the item's id, the same in every run.
        group: what the suite files it under: a theme, a rating band, a reason, or empty.
        scores: numbers that the suite's metrics are made of; those of trivial players as `player.score`.
        game: what a problem's positions were taken from; items of one game are resampled together. "" if not known.
    """

    name: str
    group: str
    prompt: str
    completion: str
    scores: dict[str, float]
    game: str = ""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """A suite's results.

    Attributes:
        settings: what two results must share to be compared, and `seed`.
        metrics: the first one is the headline.
        players: trivial players on the same items, as in the scores and as in tables.
    """

    name: str
    settings: dict[str, Any]
    metrics: Sequence[Metric]
    items: list[SuiteItem]
    players: Mapping[str, str] = field(default_factory=dict)

    def estimates(self, group: str | None = None) -> dict[str, Estimate]:
        """Every metric with its 95 % interval, over all items or over one group.

        Raises:
            ValueError: no such items.
        """
        items = [item for item in self.items if group in (None, item.group)]
        if not items:
            raise ValueError(f"suite '{self.name}' has no items{f' of group {group!r}' if group else ''}")
        return estimate([item.scores for item in items], self.metrics, [item.game for item in items])

    def baselines(self) -> Baselines:
        """What trivial players get on the same items, by metric and player, where a metric applies to them."""
        found: Baselines = {}
        for player, label in self.players.items():
            start = f"{player}."
            own = [
                {name.removeprefix(start): value for name, value in item.scores.items() if name.startswith(start)}
                for item in self.items
            ]
            for metric in self.metrics:
                try:
                    value = float(ratios(*terms(own, [metric]))[0])
                except KeyError:
                    continue
                if not np.isnan(value):
                    found.setdefault(metric.name, {})[label] = value
        return found

    def groups(self) -> dict[str, int]:
        """Items per group, sorted; empty where the suite has no groups."""
        return {name: n for name, n in sorted(Counter(item.group for item in self.items).items()) if name}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, estimates over all items and by group, trivial players, the items."""
        return {
            "suite": self.name,
            "settings": self.settings,
            "metrics": self.estimates(),
            "baselines": self.baselines(),
            "groups": {name: {"items": n, "metrics": self.estimates(name)} for name, n in self.groups().items()},
            "items": [asdict(item) for item in self.items],
        }
