"""Weights in oneDNN's own layout, for products of a few rows on a CPU, which is what decoding is made of.

The default product reads a large weight at a fraction of the memory's speed as soon as there are two rows; oneDNN's
kernels over packed weights do not. PyTorch offers them to its compiler alone; where they are missing nothing is packed.
A packed weight is a copy: whoever packs does so again when the weights have changed.
"""

import torch
from torch import Tensor

PACK_ABOVE = 5_000_000  # numbers in all weights; smaller ones stay in the cache, and there is nothing to gain
STEPS_TO_PAY = 16  # packing costs as much as some ten decoding steps save
ROWS = 32  # the number of rows to lay out for; others are hardly slower


def available() -> bool:
    """Whether this PyTorch can pack: the product of a packed weight equals the plain one."""
    try:
        weight = torch.arange(6.0).view(2, 3)
        product = packed_affine(torch.ones(1, 2), pack(weight), torch.ones(3))
        return torch.equal(product, weight.sum(0, keepdim=True) + 1)
    except (AttributeError, RuntimeError, TypeError):  # no such operator in this build, or another signature
        return False


def pays(weights: list[Tensor], max_new_tokens: int) -> bool:
    """Whether decoding up to so many tokens over these weights is faster with packing them first."""
    first = weights[0]
    return (
        first.device.type == "cpu"
        and all(weight.dtype == torch.float32 for weight in weights)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and sum(weight.numel() for weight in weights) >= PACK_ABOVE
        and max_new_tokens >= STEPS_TO_PAY
        and available()
    )


def pack(weight: Tensor) -> Tensor:
    """A weight (in, out) as `packed_affine` takes it; nothing else does."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous(), ROWS)


def packed_affine(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight + bias`, (..., out) from (..., in)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
