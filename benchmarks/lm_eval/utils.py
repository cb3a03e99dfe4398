"""Both tasks for lm-evaluation-harness: the shipped rows, prompts as they are, the scorers that training rewards.

The harness decodes without special tokens and says nothing of how a completion ended, so one that was cut at
`max_gen_toks` is read as if it had ended there; recipes/evaluate.py tells them apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict

from rookworld_trl.chess.accuracy import score
from rookworld_trl.chess.dataset import draw_of_each, load_shipped


def load(task: str, split: str = "test", rows: int | None = None, **_: Any) -> dict[str, Dataset]:
    """The rows of a task, drawn as `recipes/evaluate.py --limit` draws them; called by the harness."""
    return DatasetDict({"test": draw_of_each(load_shipped(split), {task: rows})})


def prompt(doc: Mapping[str, Any]) -> str:
    return doc["prompt"]


def target(doc: Mapping[str, Any]) -> str:
    return doc["target"]


def headlines(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The headline metrics' terms; `ratio` sums them up."""
    (result,) = score([doc], [results[0]])
    (item,) = result.items
    metrics = [metric for metric in result.metrics if metric.name in (*result.headlines, "parsed", "unparsable")]
    return {metric.name: (metric.numerator(item.scores), metric.denominator(item.scores)) for metric in metrics}


def ratio(terms: Sequence[tuple[float, float]]) -> float:
    return sum(top for top, _ in terms) / (sum(bottom for _, bottom in terms) or 1.0)
