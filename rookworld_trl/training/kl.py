"""KL between policy and reference: three directions, four estimators.

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
    exact    the sum over the vocabulary                             exact

Gradients. Differentiating an estimator as it stands forgets that y was drawn from pi, and is right only for the k2 of
KL(pi || ref) and for `exact`: k1 of KL(pi || ref) gives 0 in expectation, and its k3 the gradient of KL(ref || pi)
(arXiv 2510.01555). With the correction on (TRL's `use_bias_correction_kl`, its default), every estimator keeps its
value and takes the gradient -d grad log pi for KL(pi || ref), (1 - w) grad log pi for KL(ref || pi), half of each for
`symmetric`, whose expectations are the true gradients. For k3 of KL(pi || ref) that is what TRL computes.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

KL_TYPES = ("policy_to_reference", "reference_to_policy", "symmetric")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")

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
        "policy_to_reference": -log_ratio,
        "reference_to_policy": -log_ratio.expm1(),
        "symmetric": -(log_ratio + log_ratio.expm1()) / 2,
    }[kl_type]
    return value.detach() + slope * (logps - logps.detach())


def _estimate(d: torch.Tensor, kl_type: str, estimator: str) -> torch.Tensor:
    """The table of the module; `expm1` keeps w - 1 exact where the models nearly agree."""
    if estimator == "k2":
        return d.square() / 2
    if kl_type == "symmetric":
        return d.expm1() * d / 2
    if kl_type == "policy_to_reference":
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
            "policy_to_reference": logps.exp(),
            "reference_to_policy": -ref_logps.exp(),
            "symmetric": (logps.exp() - ref_logps.exp()) / 2,
        }[kl_type]
        return (weight * log_ratio).sum(dim=-1)

    chosen = mask.bool()
    pairs = zip(hidden[chosen].split(chunk_size), ref_hidden[chosen].split(chunk_size), strict=True)
    pieces = [checkpoint(of_chunk, h, ref_h, use_reentrant=False) for h, ref_h in pairs]
    values = torch.cat(pieces) if pieces else hidden.new_zeros(0).float()
    return torch.zeros(mask.shape, device=values.device).masked_scatter(chosen, values)
