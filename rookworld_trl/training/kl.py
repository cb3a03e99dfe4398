"""KL between policy and reference: three directions, three estimators, and its coefficient over a run.

Directions, at one prefix, over the next token y (the prefix is held fixed, as token-level penalties do):

* `policy_to_reference`  KL(pi || ref) = sum_y pi log(pi / ref): RLHF's penalty; keeps the policy inside the reference.
* `reference_to_policy`  KL(ref || pi) = sum_y ref log(ref / pi): keeps alive in the policy all that the reference does.
* `symmetric`            half of each (Jeffreys, 1946, halved).

Not "forward" and "reverse": which is which depends on the author.

Estimators from one y ~ pi, with d = log ref(y) - log pi(y) and w = exp(d) (Schulman 2020, "Approximating KL"):

             pi || ref        ref || pi          symmetric           value
    k1       -d               w d                (w - 1) d / 2       unbiased, may be negative
    k2       d^2 / 2          d^2 / 2            d^2 / 2             biased, right to second order
    k3       w - 1 - d        w d - w + 1        (w - 1) d / 2       unbiased, never negative

Gradients. Differentiating an estimator as it stands forgets that y was drawn from pi, and is right only for the k2 of
KL(pi || ref): k1 of KL(pi || ref) gives 0 in expectation, and its k3 the gradient of KL(ref || pi)
(arXiv 2510.01555). With the correction on (TRL's `use_bias_correction_kl`, its default), every estimator keeps its
value and takes the gradient -d grad log pi for KL(pi || ref), (1 - w) grad log pi for KL(ref || pi), half of each for
`symmetric`, whose expectations are the true gradients. For k3 of KL(pi || ref) that is what TRL computes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from rookworld_trl.checkpointing.store import Remembers
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.loss import Scale, aggregate

# exp(20) is 5e8: no sampled token is that much likelier under the reference unless something broke, and without a
# limit float32 overflows at 88 and turns the loss into NaN.
_MAX_LOG_RATIO = 20.0


def estimate_kl(
    logps: torch.Tensor, ref_logps: torch.Tensor, kl_type: str, estimator: str, corrected: bool = True
) -> torch.Tensor:
    """KL at each sampled token, in nats, differentiable in `logps`.

    Args:
        logps, ref_logps: log-probs of the sampled tokens, of one shape, at the sampling temperature.
        kl_type, estimator: see the module.
        corrected: take the unbiased gradient instead of the estimator's own.
    """
    d = (ref_logps - logps).clamp(max=_MAX_LOG_RATIO)
    if estimator == "k2":
        value = d.square() / 2
    elif kl_type == "symmetric":
        value = d.expm1() * d / 2  # `expm1` keeps w - 1 exact where the models nearly agree
    elif kl_type == "policy_to_reference":
        value = -d if estimator == "k1" else d.expm1() - d
    else:
        value = d.exp() * d if estimator == "k1" else d.exp() * d - d.expm1()
    if not corrected:
        return value
    log_ratio = d.detach()
    slope = {
        "policy_to_reference": -log_ratio,
        "reference_to_policy": -log_ratio.expm1(),
        "symmetric": -(log_ratio + log_ratio.expm1()) / 2,
    }[kl_type]
    return value.detach() + slope * (logps - logps.detach())


@dataclass
class KLController(Remembers):
    """The KL coefficient beta over a run.

    `multiplicative` (PPO, arXiv 1707.06347 section 4, with both factors configurable): beta *= factor above
    factor * target, beta /= factor below target / factor, judged by the mean KL of `interval` optimizer steps: the KL
    answers a new beta only after several updates, so moving at every step would overshoot and swing for good. Between
    the two bounds it is content: for a KL within 20 % of the target take a factor of 1.2.
    It stays within [minimum, maximum]. Warm-up ramps the coefficient in force linearly from 0; while it lasts, beta
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

    def update(self, kl: float) -> None:
        """Adapt to the mean KL (nats a token) of one optimizer step; ignores NaN and Inf."""
        self.steps += 1
        if self.control == "fixed" or self.steps <= self.warmup_steps or not math.isfinite(kl):
            return
        self.recent.append(kl)
        if len(self.recent) < self.interval:
            return
        mean, self.recent = sum(self.recent) / len(self.recent), []
        if mean > self.target * self.factor:
            self.beta *= self.factor
        elif mean < self.target / self.factor:
            self.beta /= self.factor
        self.beta = min(self.maximum, max(self.minimum, self.beta))


RECOVERY_BETA = 2.0  # what `--recovery_mode` multiplies the coefficient by


class KLPenalty:
    """Coefficient times KL, in place of TRL's term, and what follows from the KL of each optimizer step.

    Args:
        args: the configuration.
        accelerator: for its sums over processes.

    Attributes:
        controller: holds and moves the coefficient.
        last: of the last optimizer step, see `finish_step`; None before the first one.
    """

    def __init__(self, args: RookWorldGRPOConfig, accelerator: Any):
        self.args, self.accelerator = args, accelerator
        self.controller = KLController(
            beta=args.beta,
            control=args.kl_control,
            target=args.kl_target,
            factor=args.kl_factor,
            interval=args.kl_interval,
            minimum=args.beta_min,
            maximum=args.beta_max,
            warmup_steps=args.kl_warmup_steps,
        )
        self.last: tuple[float, torch.Tensor] | None = None
        self._sums: list[torch.Tensor] = []  # (KL, tokens) of the present step's micro-batches
        self._sequences: list[torch.Tensor] = []  # |log-ratio| of their completions

    def __call__(self, logps: torch.Tensor, batch: dict[str, Any], scale: Scale) -> torch.Tensor:
        """The term of one micro-batch, with the weights that the loss gives its other terms.

        Args:
            logps: the policy's (B, C), with their graph.
            batch: the micro-batch, `ref_per_token_logps` among it.
        """
        args, mask, reference = self.args, batch["completion_mask"], batch["ref_per_token_logps"]
        per_token = estimate_kl(logps, reference, args.kl_type, args.kl_estimator, args.use_bias_correction_kl)
        if args.use_bias_correction_kl and "old_per_token_logps" in batch:
            per_token = per_token * (logps.detach() - batch["old_per_token_logps"]).exp()
        ignored = ~mask.bool()
        log_ratio = (logps - reference).detach().float().masked_fill(ignored, 0)
        total = per_token.detach().float().masked_fill(ignored, 0).sum()
        self._sums.append(torch.stack([total, mask.bool().sum().float()]))
        self._sequences.append(log_ratio.sum(dim=-1).abs())
        return self.controller.coefficient * aggregate(per_token, mask, scale)

    def finish_step(self, metrics: dict[str, list[float]], training: bool) -> None:
        """After the last micro-batch: reduce over processes, log, and adapt the coefficient."""
        total, count = self.accelerator.reduce(torch.stack(self._sums).sum(dim=0), reduction="sum").tolist()
        mean, sequences = total / max(1.0, count), self.accelerator.gather(torch.cat(self._sequences))
        self._sums, self._sequences = [], []
        metrics["kl"].append(mean)
        metrics["kl/sequence_mean"].append(sequences.mean().item())
        if not training:
            return
        self.last = mean, sequences
        metrics["kl/coefficient"].append(self.controller.coefficient)
        metrics["kl/sequence_p95"].append(torch.quantile(sequences.float(), 0.95).item())
        self.controller.update(mean)
