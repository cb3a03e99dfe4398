"""Graceful stops: a reason in the log, in the state and in the exit code, and a checkpoint to resume from."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass
class KLStop:
    """Stops a run whose policy has left its reference.

    Attributes:
        threshold: largest tolerated KL of a completion, nats (the sum of its tokens' log-ratios, in absolute value),
            for the mean over completions and for their 95th percentile alike; 0: never stop.
        reason: why the run stops; empty while it need not.
    """

    threshold: float
    reason: str = ""

    def observe(self, sequence_kl: torch.Tensor) -> tuple[float, float]:
        """Judge one optimizer step by the absolute KL of each of its completions (N,).

        Returns:
            Mean and 95th percentile, nats a completion.
        """
        mean, p95 = sequence_kl.mean().item(), torch.quantile(sequence_kl.float(), 0.95).item()
        for name, value in (("mean", mean), ("95th percentile of the", p95)):
            if self.threshold and not value <= self.threshold and not self.reason:  # NaN stops too
                self.reason = (
                    f"kl_stop_threshold: {name} KL to the reference is {value:.4g} nats a completion, above "
                    f"{self.threshold:g}"
                )
        return mean, p95


class StopCallback(TrainerCallback):
    """Turns a stop's reason into the end of training, after a checkpoint."""

    def __init__(self, stop: KLStop):
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stop.reason:
            logger.warning(f"stopping at step {state.global_step}: {self.stop.reason}")
            state.log_history.append({"step": state.global_step, "stop_reason": self.stop.reason})
            control.should_save = control.should_training_stop = True
        return control
