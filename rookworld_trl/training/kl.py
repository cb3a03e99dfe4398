"""KL between policy and reference: three directions, four estimators, controllers of its coefficient.

Directions, at one prefix, over the next token y (the prefix is held fixed, as token-level penalties do):

* `reverse`    KL(pi || ref) = sum_y pi log(pi / ref): the penalty of RLHF; keeps the policy inside the reference.
* `forward`    KL(ref || pi) = sum_y ref log(ref / pi): keeps everything the reference does alive in the policy.
* `symmetric`  half of each (Jeffreys, 1946, halved).

Estimators from one y ~ pi, with d = log ref(y) - log pi(y) and w = exp(d) (Schulman 2020, "Approximating KL"):

             reverse          forward            symmetric           value
    k1       -d               w d                (w - 1) d / 2       unbiased, may be negative
    k2       d^2 / 2          d^2 / 2            d^2 / 2             biased, right to second order
    k3       w - 1 - d        w d - w + 1        (w - 1) d / 2       unbiased, never negative
    exact    the sum over the vocabulary                             exact

Gradients. Differentiating an estimator as it stands forgets that y was drawn from pi, and is right only for `reverse`
k2 and for `exact`: `reverse` k1 gives 0 in expectation, and `reverse` k3 gives the gradient of the *forward* KL
(arXiv 2510.01555). With the correction on (TRL's `use_bias_correction_kl`, its default), every estimator keeps its
value and takes the gradient -d grad log pi for reverse, (1 - w) grad log pi for forward, half of each for symmetric,
whose expectations are the true gradients. For `reverse` k3 that is what TRL computes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rookworld_trl.modeling.hooks import hooked

KL_TYPES = ("reverse", "forward", "symmetric")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")
KL_CONTROLS = ("fixed", "multiplicative", "proportional")

# exp(20) is 5e8: no sampled token is that much likelier under the reference unless something broke, and without a
# limit float32 overflows at 88 and turns the loss into NaN.
_MAX_LOG_RATIO = 20.0


def estimate_kl(
    logps: torch.Tensor, ref_logps: torch.Tensor, kl_type: str, estimator: str, corrected: bool = True
) -> torch.Tensor:
    """KL at each sampled token, in nats, differentiable in `logps`.

    Args:
        logps, ref_logps: log-probs of the sampled tokens, of one shape, at the sampling temperature.
        kl_type, estimator: see the module; `exact` needs the whole vocabulary, see `exact_kl`.
        corrected: take the unbiased gradient instead of the estimator's own.
    """
    value = _estimate((ref_logps - logps).clamp(max=_MAX_LOG_RATIO), kl_type, estimator)
    if not corrected:
        return value
    log_ratio = (ref_logps - logps).detach().clamp(max=_MAX_LOG_RATIO)
    slope = {
        "reverse": -log_ratio,
        "forward": -log_ratio.expm1(),
        "symmetric": -(log_ratio + log_ratio.expm1()) / 2,
    }[kl_type]
    return value.detach() + slope * (logps - logps.detach())


def _estimate(d: torch.Tensor, kl_type: str, estimator: str) -> torch.Tensor:
    """The table of the module; `expm1` keeps w - 1 exact where the models nearly agree."""
    if estimator == "k2":
        return d.square() / 2
    if kl_type == "symmetric":
        return d.expm1() * d / 2
    if kl_type == "reverse":
        return -d if estimator == "k1" else d.expm1() - d
    return d.exp() * d if estimator == "k1" else d.exp() * d - d.expm1()


def exact_kl(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    ref_hidden: torch.Tensor,
    ref_head: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor,
    kl_type: str,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """KL over the whole vocabulary at each position, differentiable in `hidden` and `head`; heads run in float32.

    Logits of only `chunk_size` positions exist at a time; the backward pass computes them again.

    Args:
        hidden, ref_hidden: (B, C, H), hidden states that predict the C completion tokens.
        head, ref_head: map (N, H) to logits (N, V).
        mask: (B, C), 1 where a token counts; other positions get 0.

    Returns:
        (B, C), nats, float32.
    """

    def log_probs(head: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> torch.Tensor:
        with torch.autocast(h.device.type, enabled=False):
            logits = head(h.float() if h.element_size() < 4 else h)
        return torch.log_softmax(logits.float() / temperature, dim=-1)

    def of_chunk(h: torch.Tensor, ref_h: torch.Tensor) -> torch.Tensor:
        logps, ref_logps = log_probs(head, h), log_probs(ref_head, ref_h).detach()
        log_ratio = logps - ref_logps
        weight = {
            "reverse": logps.exp(),
            "forward": -ref_logps.exp(),
            "symmetric": (logps.exp() - ref_logps.exp()) / 2,
        }[kl_type]
        return (weight * log_ratio).sum(dim=-1)

    chosen = mask.bool()
    pairs = zip(hidden[chosen].split(chunk_size), ref_hidden[chosen].split(chunk_size), strict=True)
    pieces = [checkpoint(of_chunk, h, ref_h, use_reentrant=False) for h, ref_h in pairs]
    values = torch.cat(pieces) if pieces else hidden.new_zeros(0).float()
    return torch.zeros(mask.shape, device=values.device).masked_scatter(chosen, values)


@contextmanager
def capture_hidden(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the last hidden states (B, S, H) of each forward pass of the backbone inside the block."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    states: list[torch.Tensor] = []
    with hooked(inner.base_model, lambda _, __, output: states.append(output.last_hidden_state)):
        yield states


def aggregate(
    per_token: torch.Tensor, mask: torch.Tensor, loss_type: str, max_length: int, accumulation: float, tokens: float
) -> torch.Tensor:
    """Reduce a per-token penalty to a scalar with the same weights that TRL's `loss_type` gives its own terms.

    Args:
        per_token, mask: (B, C).
        max_length: `max_completion_length`, the constant of `dr_grpo`.
        accumulation: micro-batches in an optimizer step.
        tokens: completion tokens of the whole optimizer step, per process (`dapo`, `cispo`, `vespo`).
    """
    total = (per_token * mask).sum(dim=-1)
    if loss_type in ("dapo", "cispo", "vespo"):
        return total.sum() / tokens
    by_type = {
        "grpo": lambda: (total / mask.sum(dim=-1).clamp(min=1)).mean(),
        "sapo": lambda: (total / mask.sum(dim=-1).clamp(min=1)).mean(),
        "bnpo": lambda: total.sum() / mask.sum().clamp(min=1),
        "dr_grpo": lambda: total.sum() / (len(mask) * max_length),
        "luspo": lambda: total.mean(),
    }
    return by_type[loss_type]() / accumulation


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
        """Mean KL, nats a token, and |log-ratio| of every completion (N,), nats, over all processes; starts anew."""
        total, count = accelerator.reduce(torch.stack(self._sums).sum(dim=0), reduction="sum").tolist()
        sequences = accelerator.gather(torch.cat(self._sequences))
        self._sums, self._sequences = [], []
        return total / max(1.0, count), sequences


@dataclass
class KLController:
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

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, "steps": self.steps, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta, self.steps = state["beta"], int(state["steps"])
        self.recent = list(state["recent"])


@dataclass
class ReferenceReset:
    """When to replace the reference by the current policy (ProRL, arXiv 2505.24864).

    Attributes:
        every: reset after so many optimizer steps; 0: never.
        stall_window: reset when the mean KL of the newer half of the last so many steps is within `tolerance` of that
            of the older half: the policy has stopped moving away, held by the penalty; 0: never.
    """

    every: int = 0
    stall_window: int = 0
    tolerance: float = 0.05
    steps: int = 0
    history: list[float] = field(default_factory=list)

    def observe(self, kl: float) -> None:
        self.steps += 1
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
        """Start counting anew."""
        self.steps, self.history = 0, []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.history = int(state["steps"]), list(state["history"])
