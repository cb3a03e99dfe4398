"""Exact sampling: the distribution, the draw, and random numbers that belong to a row and not to its batch."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sampling_log_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-probs (..., V) of the distribution that is sampled from; what top-k and top-p cut has -inf.

    Filters apply in the usual order: temperature, the `top_k` most probable tokens (ties with the last one stay), of
    those the smallest set whose probability reaches `top_p`; then everything is renormalised. Temperature 0 is greedy:
    the log-probs are then the model's own, at temperature 1 and unfiltered.

    Args:
        top_k: 0 for no limit.
        top_p: 1 for no limit.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.log_softmax(-1)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the mass before a token already suffices
        beyond[..., 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits.log_softmax(-1)


def cumulative_probs(log_probs: Tensor, greedy: bool = False) -> Tensor:
    """Cumulative distribution (..., V); for greedy decoding, that of the certain choice of the most probable token."""
    if greedy:
        tokens = torch.arange(log_probs.shape[-1], device=log_probs.device)
        return (tokens >= log_probs.argmax(-1, keepdim=True)).float()
    probs = log_probs.exp()
    sums = probs.cumsum(-1)
    # A CPU adds one after the other, in double precision: sums never fall, and stay where the probability is 0. The
    # parallel scan of a GPU promises neither.
    return sums if sums.device.type == "cpu" else rising(sums, probs)


def rising(sums: Tensor, probs: Tensor) -> Tensor:
    """Rounded sums (..., V) of probabilities made to rise where a token has one, and nowhere else.

    Then the first sum above any target below the total is that of a token with a probability, and a binary search
    finds it.
    """
    return sums.masked_fill(probs == 0, 0).cummax(-1).values


def inversion_targets(totals: Tensor, uniforms: Tensor) -> Tensor:
    """Where uniforms in [0, 1) fall in distributions that sum to `totals`; a token holds [sum before it, its sum).

    Rounding must reach neither the total itself nor a token of probability 0: the first sum above the target has one.
    """
    return (uniforms * totals).minimum(totals.nextafter(torch.zeros_like(totals)))


def draw(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """One token for each row by inverting its cumulative distribution (N, V) at its uniform (N,) in [0, 1).

    A row of NaN, where nothing can be drawn, gets a token too: its log-prob tells the caller.
    """
    targets = inversion_targets(cumulative[:, -1:], uniforms[:, None])
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return tokens.clamp(max=cumulative.shape[-1] - 1)


def row_generator(seed: int, prompt_ids: Sequence[int], sample: int) -> np.random.Generator:
    """The random stream of one sample: a function of the seed, the prompt and the sample's number alone.

    Whatever else is in the batch, and in whichever order, the row draws the same numbers. Philox is counter-based
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so a key is all the setup it needs.
    """
    text = f"{seed}|{sample}|{','.join(map(str, prompt_ids))}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
