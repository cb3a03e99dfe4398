"""What moves with the KL over a run: its measurement, its coefficient, its reference, and the end of the run."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rookworld_trl.checkpointing.state import Remembers

logger = logging.get_logger(__name__)

KL_CONTROLS = ("fixed", "multiplicative", "proportional")


class KLMeter:
    """The KL of one optimizer step, collected over its micro-batches and processes."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._sequences: list[torch.Tensor] = []

    def add(self, per_token_kl: torch.Tensor, log_ratio: torch.Tensor, mask: torch.Tensor) -> None:
        """Count one micro-batch.

        Args:
            per_token_kl: (B, C), the estimator's values.
            log_ratio: (B, C), log policy - log reference of the sampled tokens.
            mask: (B, C).
        """
        chosen = mask.bool()
        total = per_token_kl.detach().float().masked_fill(~chosen, 0).sum()
        self._sums.append(torch.stack([total, chosen.sum().float()]))
        self._sequences.append(log_ratio.detach().float().masked_fill(~chosen, 0).sum(dim=-1).abs())

    def reduce(self, accelerator: Any) -> tuple[float, torch.Tensor]:
        """Mean KL, nats a token, and |log-ratio| of every completion (N,), nats, over all processes; starts over."""
        total, count = accelerator.reduce(torch.stack(self._sums).sum(dim=0), reduction="sum").tolist()
        sequences = accelerator.gather(torch.cat(self._sequences))
        self._sums, self._sequences = [], []
        return total / max(1.0, count), sequences


@dataclass
class KLController(Remembers):
    """The KL coefficient beta over a run.

    `multiplicative` (PPO, arXiv 1707.06347 section 4, with both factors configurable): beta *= factor above
    factor * target, beta /= factor below target / factor, judged by the mean KL of `interval` optimizer steps: the KL
    answers a new beta only after several updates, so moving at every step would overshoot and swing for good. Between
    the two bounds it is content: for a KL within 20 % of the target take a factor of 1.2.
    `proportional` (Ziegler et al., arXiv 1909.08593): beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon at
    every step, where n is the number of completions in the update.
    Both stay within [minimum, maximum]. Warm-up ramps the coefficient in force linearly from 0; while it lasts, beta
    itself does not adapt, for the KL then says nothing about beta.

    Attributes:
        beta: the coefficient after warm-up.
        target: wanted KL, nats a token.
        steps: optimizer steps seen.
        recent: KL of the steps since `multiplicative` last judged.
    """

    REMEMBERED = ("beta", "steps", "recent")

    beta: float
    control: str = "fixed"
    target: float = 0.03
    factor: float = 1.5
    horizon: float = 10_000
    interval: int = 10
    minimum: float = 1e-4
    maximum: float = 10.0
    warmup_steps: int = 0
    steps: int = 0
    recent: list[float] = field(default_factory=list)

    @property
    def coefficient(self) -> float:
        """Beta in force for the coming update."""
        return self.beta * min(1.0, self.steps / self.warmup_steps) if self.warmup_steps else self.beta

    def update(self, kl: float, completions: int) -> None:
        """Adapt to the mean KL (nats a token) of one optimizer step over `completions` samples; ignores NaN and Inf."""
        self.steps += 1
        if self.control == "fixed" or self.steps <= self.warmup_steps or not math.isfinite(kl):
            return
        if self.control == "proportional":
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.beta *= 1 + error * completions / self.horizon
        else:
            self.recent.append(kl)
            if len(self.recent) < self.interval:
                return
            mean, self.recent = sum(self.recent) / len(self.recent), []
            if mean > self.target * self.factor:
                self.beta *= self.factor
            elif mean < self.target / self.factor:
                self.beta /= self.factor
        self.beta = min(self.maximum, max(self.minimum, self.beta))


@dataclass
class ReferenceReset(Remembers):
    """When to replace the reference by the current policy (ProRL, arXiv 2505.24864).

    Attributes:
        every: reset after so many optimizer steps; 0: never.
        stall_window: reset when the mean KL of the newer half of the last so many numbers is within `tolerance` of that
            of the older half: the policy has stopped moving away, held by the penalty; 0: never.
    """

    REMEMBERED = ("steps", "history")

    every: int = 0
    stall_window: int = 0
    tolerance: float = 0.05
    steps: int = 0
    history: list[float] = field(default_factory=list)

    def observe(self, kl: float) -> None:
        """Count one optimizer step by its mean KL, which says nothing about a stall if it is NaN or Inf."""
        self.steps += 1
        if math.isfinite(kl):
            self.history = [*self.history, kl][-max(1, self.stall_window) :]

    @property
    def due(self) -> bool:
        if self.every and self.steps >= self.every:
            return True
        window, history = self.stall_window, self.history
        if not window or len(history) < window:
            return False
        older, newer = sum(history[: window // 2]) / (window // 2), sum(history[-(window // 2) :]) / (window // 2)
        return older > 0 and abs(newer - older) <= self.tolerance * older

    def done(self) -> None:
        """Start counting from 0 again."""
        self.steps, self.history = 0, []


@dataclass
class KLStop(Remembers, TrainerCallback):
    """Stops a run whose policy has left its reference, with a checkpoint.

    Attributes:
        threshold: largest tolerated KL of a completion, nats (the sum of its tokens' log-ratios, in absolute value),
            for the mean over completions and for their 95th percentile alike; 0: never stop.
        reason: why the run stops; empty while it need not.
    """

    REMEMBERED = ("reason",)

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.reason:
            logger.warning(f"stopping at step {state.global_step}: {self.reason}")
            state.log_history.append({"step": state.global_step, "stop_reason": self.reason})
            control.should_save = control.should_training_stop = True
