"""GPT-2's blocks compiled, for passes whose number of tokens differs from batch to batch.

Attention stays as it is: its kernels are fused already, and its tiles have too many shapes. What is left of a block
works token by token, so all layers of a pass share one graph, and only the number of tokens can make another. Passes
are padded so that few numbers occur; a code object has at most `torch._dynamo.config.recompile_limit` graphs, and runs
as it is written for whatever comes after.
"""

from collections.abc import Mapping
from typing import Any

import torch

from rookworld_trl.modeling.gpt2 import Blocks, after_attention, before_attention

MULTIPLE = 64  # tokens: what tensor cores like, where one graph does for all lengths
SMALLEST = 512  # tokens, where each length has a graph of its own: rows scored alone all fall into this one


def compile_blocks(options: Mapping[str, Any]) -> Blocks:
    """Blocks by `torch.compile`.

    Args:
        options: its arguments; the graphs are for one number of tokens each where `dynamic` is False.
    """
    before, after = torch.compile(before_attention, **options), torch.compile(after_attention, **options)
    return Blocks(before, after, bucket if options.get("dynamic") is False else next_multiple)


def next_multiple(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def bucket(tokens: int) -> int:
    """The next of four sizes an octave, 512 at least: 512, 640, 768, 896, 1024, 1280, ...; at most a quarter more."""
    tokens = max(tokens, SMALLEST)
    step = 1 << (tokens - 1).bit_length() >> 3
    return -(-tokens // step) * step
