"""Held-out metrics on the way: measured without a trace in training, with the best so far beside them."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

# Takes the policy as a plain model and the held-out rows; a metric that is not defined on them is NaN.
Evaluator = Callable[[PreTrainedModel, Any], Mapping[str, float]]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in evaluation mode; every generator of random numbers then goes on as before."""
    training, own, numbers = model.training, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numbers)
        model.train(training)


def with_best(
    found: Mapping[str, float], prefix: str, args: TrainingArguments, state: TrainerState
) -> dict[str, float]:
    """The metrics under transformers' names, and where one of them chooses: `best`, its best value, and `best_step`.

    Raises:
        ValueError: `metric_for_best_model` is not among them.
    """
    metrics = {f"{prefix}_{name}": float(value) for name, value in found.items()}
    chosen = args.metric_for_best_model
    if not chosen:
        return metrics
    key = chosen if chosen.startswith("eval_") else f"eval_{chosen}"
    if key not in metrics:
        names = ", ".join(found)
        raise ValueError(f"`metric_for_best_model` is '{chosen}': the evaluation gives {names}. Choose one of them")
    best, step = state.best_metric, state.best_global_step
    value = metrics[key]
    if value == value and (best is None or (value > best if args.greater_is_better else value < best)):
        best, step = value, state.global_step
    known = {} if best is None or step is None else {f"{prefix}_best": best, f"{prefix}_best_step": float(step)}
    return {**metrics, **known}
