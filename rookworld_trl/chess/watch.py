"""What a training run watches on held-out rows: every metric by greedy decoding, without intervals."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from rookworld_trl.chess.accuracy import evaluate
from rookworld_trl.measuring.intervals import ratios
from rookworld_trl.measuring.metrics import METRICS, terms

REWARD = "reward"  # the mean over both tasks' items
SCORES = {"graduated": "reward", "continuous": "continuous"}  # by the name of the rewards, an item's score
METRIC_NAMES = (REWARD, *(f"{task}/{metric.name}" for task, metrics in METRICS.items() for metric in metrics))


class Watch:
    """An evaluator for the trainer: `(model, rows) -> metrics`, by `task/metric`, and the mean reward as `reward`.

    Args:
        reward: which rewards that is of: `graduated` or `continuous`.
        chosen: the metric that the best checkpoint is kept by, if any.
        settings: `evaluate`'s.

    Raises:
        ValueError: there is no such metric as `chosen`.
    """

    def __init__(self, tokenizer: Any, reward: str, chosen: str | None, settings: Mapping[str, Any]):
        if chosen is not None and chosen.removeprefix("eval_") not in METRIC_NAMES:
            raise ValueError(
                f"`metric_for_best_model` is '{chosen}': no such metric is measured. Choose one of "
                f"{', '.join(METRIC_NAMES)}"
            )
        self.tokenizer, self.score, self.settings = tokenizer, SCORES[reward], dict(settings)

    def __call__(self, model: PreTrainedModel, rows: Any) -> dict[str, float]:
        evaluation = evaluate(model, self.tokenizer, rows, modes=["greedy"], **self.settings)
        found = {REWARD: math.fsum(item.scores[self.score] for item in evaluation.items) / len(evaluation.items)}
        for task, mode in evaluation.tasks_and_modes():
            values = ratios(*terms([item.scores for item in evaluation.select(task, mode)], METRICS[task]))
            found |= {f"{task}/{metric.name}": float(v) for metric, v in zip(METRICS[task], values, strict=True)}
        return found
