"""Stops a run whose policy has left its reference, with a checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rookworld_trl.settings.parser import option
from rookworld_trl.training.config import NO_KL
from rookworld_trl.training.plugin import Plugin

logger = logging.get_logger(__name__)

KL_STOP = 50.0  # nats a completion


@dataclass
class KLStop(Plugin):
    """Judges each optimizer step by the KL of its completions: the sum of their tokens' log-ratios, in absolute value.

    Attributes:
        threshold: largest tolerated, for the mean over completions and for their 95th percentile alike; 0: never stop.
        reason: why the run stops; empty while it need not.
    """

    NAME = "kl_stop_threshold"

    kl_stop_threshold: float | None = option(
        None,
        "Stop, with a checkpoint, when mean or 95th percentile of the completions' |KL| (nats a completion) exceeds "
        "this; 0: never. Default: 50, and 0 where `beta` is 0 and there is no KL.",
        least=0,
    )
    reason: str = field(default="", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.threshold = KL_STOP if self.kl_stop_threshold is None else self.kl_stop_threshold

    @property
    def on(self) -> bool:
        return self.threshold > 0

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        if args.beta == 0 and self.kl_stop_threshold:
            yield f"kl_stop_threshold: {NO_KL}"

    def observe(self, sequence_kl: torch.Tensor) -> None:
        """Judge one optimizer step by the absolute KL of each of its completions (N,), nats."""
        p95 = torch.quantile(sequence_kl.float(), 0.95).item()
        for name, value in (("mean", sequence_kl.mean().item()), ("95th percentile of the", p95)):
            if not value <= self.threshold and not self.reason:  # NaN stops too
                self.reason = (
                    f"kl_stop_threshold: {name} KL to the reference is {value:.4g} nats a completion, above "
                    f"{self.threshold:g}"
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if (measured := self.trainer.step_kl) is not None:
            self.observe(measured[1])
        if self.reason:
            logger.warning(f"stopping at step {state.global_step}: {self.reason}")
            state.log_history.append({"step": state.global_step, "stop_reason": self.reason})
            control.should_save = control.should_training_stop = True
