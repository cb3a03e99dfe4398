"""Decoding many continuations of each prompt against one copy of the prompt's keys and values.

Slots are laid out in tiles: a tile is one prompt and `width` of its continuations, so that attention to the prefix is
one matrix product a tile (all the queries against the shared keys) instead of one memory-bound vector product for each
continuation. As continuations finish, the live ones are gathered into fewer slots; a prompt whose live ones do not fit
one tile takes several.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rookworld_trl.modeling.gpt2 import GPT2

# What a tile costs beside its slots, in slots: it owns a copy of the prefix. On a CPU 0 is 15-60 % slower, and all from
# 0.5 to 8 is alike.
TILE_COST = 2
# Gathering copies caches: worth it when this share of the cost or less is left.
COMPACT_BELOW = 0.85


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of P token sequences, right-padded to L tokens.

    Attributes:
        data: (layers, 2, P, heads, L, head_dim), keys and values.
        lengths: (P,), tokens of each sequence.
    """

    data: Tensor
    lengths: Tensor


def prefill(gpt2: GPT2, sequences: Sequence[Sequence[int]]) -> tuple[Prefix, Tensor]:
    """One pass over token sequences; returns their prefix and the final hidden states (P, L, n_embd)."""
    config, device = gpt2.config, gpt2.wte.device
    longest = max(len(ids) for ids in sequences)
    # Padding stands on the right, behind everything real, so the causal mask alone hides it from the real tokens.
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else gpt2.wte.dtype  # what keys come out in
    shape = (config.n_layer, 2, len(sequences), config.n_head, longest, gpt2.head_dim)
    data = torch.empty(shape, dtype=dtype, device=device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        data[layer, 0], data[layer, 1] = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    hidden = gpt2.hidden_states(ids, torch.arange(longest, device=device), attend)
    return Prefix(data, torch.tensor([len(ids) for ids in sequences], device=device)), hidden


class SharedPrefixDecoder:
    """Continues items, each from some length of a prefix, in slots with room for `capacity` own tokens.

    Args:
        prefix_of_item: (n,), ascending.
        prefix_lengths: (n,), how many tokens of its prefix each item continues from.

    Attributes:
        source: (N,), the item in each slot; an empty slot repeats an item of its tile.
        filled: (N,), False for empty slots.
        length: tokens that each slot has of its own.
    """

    def __init__(
        self, gpt2: GPT2, prefix: Prefix, prefix_of_item: Tensor, prefix_lengths: Tensor, capacity: int
    ) -> None:
        self.gpt2, self.length = gpt2, 0
        self._prefix = prefix.data
        self._arrange(_Layout(prefix_of_item.cpu().numpy()), prefix_of_item)
        self._prefix_of_slot, self._prefix_lengths = prefix_of_item[self.source], prefix_lengths[self.source]
        self._select_prefixes(self._prefix_of_slot[:: self._width])
        config = gpt2.config
        shape = (config.n_layer, 2, self._tiles, config.n_head, self._width, capacity, gpt2.head_dim)
        self._own = torch.empty(shape, dtype=prefix.data.dtype, device=prefix.data.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Append a token (N,) to each slot; returns their final hidden states (N, n_embd)."""
        # Finished slots may run past the context.
        positions = (self._prefix_lengths + self.length).clamp(max=self.gpt2.config.n_positions - 1)
        hidden = self.gpt2.hidden_states(tokens[:, None], positions[:, None], self._attend)
        self.length += 1
        return hidden.squeeze(1)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of (N, 1, heads, head_dim) to the prefix and to the slot's own tokens, this one included."""
        tiles, width, stop = self._tiles, self._width, self.length + 1
        heads, dim = q.shape[2:]
        q, k, v = (x.view(tiles, width, heads, dim).transpose(1, 2) for x in (q, k, v))  # (tiles, heads, width, dim)
        own_keys, own_values = self._own[layer]
        own_keys[..., self.length, :], own_values[..., self.length, :] = k, v
        own_keys, own_values = (x.flatten(0, 2)[:, :stop] for x in (own_keys, own_values))
        prefix_keys, prefix_values = self._prefix[layer].flatten(1, 2)
        # One softmax over both parts: a tile's queries against its prefix, a slot's against its own tokens.
        q = q.reshape(tiles * heads, width, dim) * scale
        to_prefix = torch.baddbmm(self._bias, q, prefix_keys.mT)
        to_own = torch.bmm(q.reshape(-1, 1, dim), own_keys.mT)
        probs = torch.cat([to_prefix, to_own.view(*to_prefix.shape[:2], stop)], -1).softmax(-1).to(q.dtype)
        from_prefix, from_own = probs.split([prefix_keys.shape[1], stop], -1)
        mixed = torch.bmm(from_prefix, prefix_values).view(-1, 1, dim)
        mixed = torch.baddbmm(mixed, from_own.view(-1, 1, stop), own_values)
        return mixed.view(tiles, heads, width, dim).transpose(1, 2).reshape(-1, 1, heads, dim)

    def compact(self, alive: Tensor) -> Tensor | None:
        """Gather the live slots (N,) into fewer, if that pays: they are the items now.

        Returns:
            The live slots (n,) in the order of the new items; None if nothing was moved.
        """
        live = (alive & self.filled).nonzero().squeeze(-1)
        layout = _Layout(self._prefix_of_slot[live].cpu().numpy())
        if layout.cost > COMPACT_BELOW * self._cost:
            return None
        width = self._width
        self._arrange(layout, live)
        slots = live[self.source]
        self._prefix_of_slot, self._prefix_lengths = self._prefix_of_slot[slots], self._prefix_lengths[slots]
        layers, _, _, heads, _, capacity, dim = self._own.shape
        gathered = self._own.new_empty(layers, 2, self._tiles, heads, self._width, capacity, dim)
        for source, target in zip(self._own[..., : self.length, :], gathered, strict=True):
            # Advanced indices apart from each other put the slots first: (slots, 2, heads, length, dim).
            own = source[:, slots // width, :, slots % width].unflatten(0, (self._tiles, self._width))
            target[..., : self.length, :] = own.permute(2, 0, 3, 1, 4, 5)
        self._own = gathered
        self._select_prefixes(slots[:: self._width] // width)
        return live

    def _arrange(self, layout: "_Layout", like: Tensor) -> None:
        self._tiles, self._width, self._cost = layout.tiles, layout.width, layout.cost
        self.source = torch.from_numpy(layout.source).to(like.device)
        self.filled = torch.from_numpy(layout.filled).to(like.device)

    def _select_prefixes(self, prefix_of_tile: Tensor) -> None:
        """Keep these prefixes; the bias (tiles * heads, width or 1, L) is -inf behind what a slot continues from."""
        longest = int(self._prefix_lengths.max())
        every = torch.arange(self._prefix.shape[2], device=prefix_of_tile.device)
        if longest < self._prefix.shape[-2] or not torch.equal(prefix_of_tile, every):
            self._prefix = self._prefix[..., :longest, :].index_select(2, prefix_of_tile)
        lengths = self._prefix_lengths.view(self._tiles, self._width)
        if torch.equal(lengths, lengths[:, :1].expand_as(lengths)):
            lengths = lengths[:, :1]  # one bias for the whole tile
        hidden = torch.arange(longest, device=lengths.device) >= lengths[..., None]  # (tiles, width or 1, longest)
        bias = torch.zeros(hidden.shape, dtype=self._prefix.dtype, device=lengths.device)
        self._bias = bias.masked_fill(hidden, -torch.inf).repeat_interleave(self.gpt2.config.n_head, 0)


class _Layout:
    """The cheapest arrangement of items in tiles of one width; items of one prefix stand together.

    Args:
        prefix_of_item: (n,), ascending.

    Attributes:
        source: (tiles * width,), the item in each slot; an empty slot repeats the first item of its tile.
        filled: (tiles * width,), False for empty slots.
    """

    def __init__(self, prefix_of_item: np.ndarray) -> None:
        counts = np.unique(prefix_of_item, return_counts=True)[1]
        largest = int(counts.max())
        widths = {-(-largest // parts) for parts in range(1, min(largest, 64) + 1)}
        tiles = {width: int(np.sum(-(-counts // width))) for width in widths}
        self.cost, self.width = min((tiles[width] * (width + TILE_COST), width) for width in widths)
        tiles_of_prefix = -(-counts // self.width)
        self.tiles = int(tiles_of_prefix.sum())
        first_item, first_tile = np.cumsum(counts) - counts, np.cumsum(tiles_of_prefix) - tiles_of_prefix
        prefix = np.repeat(np.arange(len(counts)), counts)
        rank = np.arange(len(prefix_of_item)) - first_item[prefix]
        slot = (first_tile[prefix] + rank // self.width) * self.width + rank % self.width
        self.filled = np.zeros(self.tiles * self.width, dtype=bool)
        self.filled[slot] = True
        self.source = np.zeros(self.tiles * self.width, dtype=np.int64)
        self.source[slot] = np.arange(len(prefix_of_item))
        first_of_tile = np.repeat(self.source[:: self.width], self.width)  # a tile's first slot is never empty
        self.source = np.where(self.filled, self.source, first_of_tile)
