"""The loss of a micro-batch on one page: from the log-probs of sampled tokens to the scalar that is differentiated.

    L = aggregate(-min(rho A, clip(rho) A)) - aggregate(exact objective) - coefficient H  [+ the KL penalty, `kl.py`]

with rho = pi / pi_old of a token, A the advantage of its completion (of the token, under GAE), H the mean entropy.
It replaces the body of TRL's `_compute_loss`, so that everything the loss is made of is handed to it: log-probs and
entropies, whoever computed them, the batch, and the settings. `tests/training/test_loss.py` holds value, gradient and
metrics to TRL's own for every option that both know.

Where things come from: the clipped ratio, PPO (arXiv 1707.06347); its higher upper bound, DAPO (arXiv 2503.14476);
`delta`, a bound on the ratio where the advantage is negative, INTELLECT-2 (arXiv 2505.07291); one ratio a completion,
GSPO (arXiv 2507.18071); tokens of high entropy alone, arXiv 2506.01939; off-policy completions left out, DeepSeek-V3.2
(arXiv 2512.02556); the four `loss_type`s differ in `aggregate` alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo")

Batch = dict[str, Any]
Measured = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scored:
    """What the policy says of a micro-batch; all (B, C), float32, 0 where the completion is masked.

    Attributes:
        logps, entropies: of the sampled tokens (nats); log-probs with their graph.
        objective: what the exact objective adds up to in each cell, to be maximised; None: all is sampled.
        by_samples: (B,) rows whose sampled advantages count; None: all.
        auxiliary: the router's loss of a mixture of experts, else None.
        metrics: sum and count over the batch by name, for the log of the exact objective.
    """

    logps: Tensor
    entropies: Tensor
    objective: Tensor | None = None
    by_samples: Tensor | None = None
    auxiliary: Tensor | None = None
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a token weighs: what `loss_type` divides by.

    Attributes:
        loss_type: one of `LOSS_TYPES`.
        max_length: `max_completion_length`, the constant of `dr_grpo`.
        accumulation: micro-batches in the optimizer step.
        tokens: completion tokens of the whole optimizer step, per process (`dapo`).
    """

    loss_type: str
    max_length: int
    accumulation: int
    tokens: Tensor | float

    @classmethod
    def of_batch(cls, args: Any, batch: Batch, processes: int, training: bool, accumulation: int) -> "Scale":
        """Of one micro-batch of a generation batch.

        Args:
            args: the configuration.
            processes: that train together.
            training: else the batch is neither cut nor accumulated.
            accumulation: micro-batches in this optimizer step.
        """
        tokens = batch["num_items_in_batch"].clamp(min=1) / processes
        if training:  # `num_items_in_batch` counts the generation batch; an update sees a part of it
            tokens = tokens * accumulation / args.steps_per_generation
        return cls(args.loss_type, args.max_completion_length, accumulation if training else 1, tokens)


def aggregate(per_token: Tensor, mask: Tensor, scale: Scale) -> Tensor:
    """Reduce a term of the loss at each token to a scalar.

    `dapo` weighs every token of the optimizer step alike; `grpo` every completion, whatever its length; `dr_grpo`
    (arXiv 2503.20783) divides by a constant; `bnpo` weighs the tokens of one micro-batch alike.

    Args:
        per_token, mask: (B, C).
    """
    total = (per_token * mask).sum(dim=-1)
    if scale.loss_type == "dapo":
        return total.sum() / scale.tokens
    by_type: dict[str, Callable[[], Tensor]] = {
        "grpo": lambda: (total / mask.sum(dim=-1).clamp(min=1)).mean(),
        "dr_grpo": lambda: total.sum() / (len(mask) * scale.max_length),
        "bnpo": lambda: total.sum() / mask.sum().clamp(min=1),
    }
    return by_type[scale.loss_type]() / scale.accumulation


def policy_terms(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, args: Any
) -> tuple[Tensor, Measured]:
    """-min(rho A, clip(rho) A) at each token (B, C) or completion (B, 1), and where the clip binds, by its metric.

    Args:
        logps, old_logps, mask: (B, C).
        advantages: (B, 1) or (B, C).
    """
    low, high = 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
    log_ratio = logps - old_logps
    if args.importance_sampling_level == "sequence":  # the geometric mean over each completion
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(low, high)
    if args.delta is not None:
        ratio = ratio.clamp(max=args.delta)
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    measured = {"low": below.float(), "high": above.float(), "region": (below | above).float()}
    return -torch.min(ratio * advantages, clipped * advantages), measured


def on_policy(logps: Tensor, sampled_logps: Tensor, advantages: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """1 where a completion (B, 1) is kept: its advantage is not negative, or its mean log-ratio at most `threshold`.

    Args:
        sampled_logps: of whoever sampled; NaN where that is not known.
    """
    drift = (sampled_logps - logps.detach()).nan_to_num(nan=0.0)
    mean = (drift * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (mean <= threshold)).to(mask.dtype)


def of_high_entropy(entropies: Tensor, mask: Tensor, share: float, accelerator: Accelerator) -> Tensor:
    """(B, C) bool: the `share` of all processes' tokens whose entropy is highest."""
    unknown = -1.0  # no entropy is negative
    mine = accelerator.pad_across_processes(entropies.detach()[mask.bool()].float(), dim=0, pad_index=unknown)
    everyones = accelerator.gather(mine)
    known = everyones[everyones != unknown]
    if not known.numel():
        return torch.zeros_like(mask, dtype=torch.bool)
    return (entropies >= torch.quantile(known, 1 - share)) & mask.bool()


def compute(
    scored: Scored, batch: Batch, args: Any, scale: Scale, accelerator: Accelerator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch without its KL penalty, and what TRL logs of it, over all processes.

    Args:
        scored: what the policy says.
        batch: `completion_mask` (B, C), `advantages` (B,) or (B, C); if there are any, `old_per_token_logps`,
            `sampling_per_token_logps` and `importance_sampling_ratio` (B, C) or (B, 1), of another sampler's samples.
        args: the configuration.
        scale: how much a token weighs.
    """
    mask, advantages = batch["completion_mask"], batch["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    if scored.by_samples is not None:
        advantages = advantages.masked_fill(~scored.by_samples[:, None], 0.0)  # a reward that is none stays out
    old_logps: Tensor = scored.logps.detach()
    if batch.get("old_per_token_logps") is not None:
        old_logps = batch["old_per_token_logps"]
    per_token, clipped = policy_terms(scored.logps, old_logps, advantages, mask, args)
    counted = mask  # tokens that the policy term and the bonus act on
    if args.off_policy_mask_threshold is not None:
        sampled = batch.get("sampling_per_token_logps", old_logps)
        per_token = per_token * on_policy(scored.logps, sampled, advantages, mask, args.off_policy_mask_threshold)
    if args.top_entropy_quantile < 1:
        chosen = of_high_entropy(scored.entropies, mask, args.top_entropy_quantile, accelerator)
        per_token, counted = per_token * chosen, mask * chosen
    if "importance_sampling_ratio" in batch:
        per_token = per_token * batch["importance_sampling_ratio"]
    loss = aggregate(per_token, mask, scale)
    if scored.objective is not None:
        loss = loss - aggregate(scored.objective, mask, scale)
    metrics = _means(scored, clipped, mask, accelerator)
    if args.entropy_coef:
        undivided = loss.detach() if scale.loss_type == "dapo" else loss.detach() * scale.accumulation
        metrics["policy_loss"] = accelerator.gather(undivided).nanmean().item()
        mean = (scored.entropies * counted).sum() / counted.sum().clamp(min=1)
        loss = loss - args.entropy_coef * (mean / scale.accumulation)
    if scored.auxiliary is not None:
        loss = loss + args.router_aux_loss_coef * scored.auxiliary / scale.accumulation
        metrics["aux_loss"] = accelerator.gather(scored.auxiliary.detach()).mean().item()
    return loss, metrics


def _means(scored: Scored, clipped: Measured, mask: Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Mean entropy and shares of clipped tokens (of completions, where the ratio is theirs), and these' extremes."""

    def sums(values: Tensor) -> list[Tensor]:
        if values.shape[1] == 1:
            return [values.sum(), values.new_tensor(float(len(values)))]
        return [(values * mask).sum(), mask.sum().float()]

    with torch.no_grad():
        named = {"entropy": scored.entropies, **{f"clip_ratio/{name}_mean": each for name, each in clipped.items()}}
        pairs = torch.stack([each for values in named.values() for each in sums(values)])
        totals = accelerator.reduce(pairs, "sum").view(-1, 2).tolist()
        means = {name: total / max(count, 1.0) for name, (total, count) in zip(named, totals, strict=True)}
        of_rows = [
            each[:, 0] if each.shape[1] == 1 else (each * mask).sum(-1) / mask.sum(-1)
            for each in (clipped["low"], clipped["high"])
        ]
        low, high = accelerator.gather(torch.stack(of_rows, dim=1)).unbind(1)
    known = ~low.isnan()
    extremes = (low[known].min().item(), high[known].max().item()) if known.any() else (float("nan"), float("nan"))
    return {**means, "clip_ratio/low_min": extremes[0], "clip_ratio/high_max": extremes[1]}
