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
    """Continues items, each from some length of a prefix, in slots with room for `capacity` own tokens to begin with.

    Args:
        prefix_of_item: (n,), ascending.
        prefix_lengths: (n,), how many tokens of its prefix each item continues from.

    Attributes:
        source: (N,), the item in each slot; an empty slot repeats an item of its tile.
        filled: (N,), False for empty slots.
        length: columns of the slots' own tokens in use.
    """

    def __init__(
        self, gpt2: GPT2, prefix: Prefix, prefix_of_item: Tensor, prefix_lengths: Tensor, capacity: int
    ) -> None:
        self.gpt2, self.length = gpt2, 0
        self._prefix = prefix.data
        self._arrange(_Layout(prefix_of_item.cpu().numpy()), prefix_of_item)
        self._prefix_of_slot, self._prefix_lengths = prefix_of_item[self.source], prefix_lengths[self.source]
        self._own_lengths = torch.zeros_like(self._prefix_lengths)
        self._own_before, self._start = self._own_lengths, 0  # own tokens before the last pass, column where it began
        self._used = torch.zeros(len(self.source), capacity, dtype=torch.bool, device=self.source.device)
        self._gapless = True  # every slot uses all columns so far
        self._select_prefixes(self._prefix_of_slot[:: self._width])
        config = gpt2.config
        shape = (config.n_layer, 2, self._tiles, config.n_head, self._width, capacity, gpt2.head_dim)
        self._own = torch.empty(shape, dtype=prefix.data.dtype, device=prefix.data.device)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Append tokens (N, C) to the slots.

        Args:
            lengths: (N,), how many of the C tokens each slot really has; None: all. Only those are computed.

        Returns:
            Final hidden states (M, n_embd) of the tokens that slots really have, slot by slot.
        """
        count = tokens.shape[1]
        self.reserve(self.length + count)
        self._start, self._own_before = self.length, self._own_lengths
        steps = torch.arange(count, device=tokens.device)
        positions = (self._prefix_lengths + self._own_lengths)[:, None] + steps
        positions = positions.clamp(max=self.gpt2.config.n_positions - 1)  # finished slots may run past the context
        used = self._used[:, self.length : self.length + count]
        used[:] = True
        real = None
        if lengths is not None:
            used[:] = steps < lengths[:, None]
            real = used.flatten().nonzero().squeeze(-1)
            tokens, positions = tokens.flatten()[real], positions.flatten()[real]
            self._gapless = False
        prefix_bias, own_bias = self._prefix_bias(count), self._own_bias(count)

        stop = self.length + count
        columns = slice(self.length, stop)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if real is None:
                return self._attend(layer, q, k, v, scale, prefix_bias, own_bias, columns, stop)
            padded = q.new_zeros(3, len(self.source) * count, *q.shape[1:])
            padded[0, real], padded[1, real], padded[2, real] = q, k, v
            q, k, v = padded.unflatten(1, (-1, count))
            return self._attend(layer, q, k, v, scale, prefix_bias, own_bias, columns, stop).flatten(0, 1)[real]

        hidden = self.gpt2.hidden_states(tokens, positions, attend)
        self._own_lengths = self._own_lengths + (count if lengths is None else lengths)
        self.length += count
        return hidden.view(-1, hidden.shape[-1])

    def reserve(self, columns: int) -> None:
        """Make room for so many of the slots' own tokens; a slot that runs out of room gets it as it goes."""
        missing = columns - self._used.shape[1]
        if missing > 0:
            self._used, self._own = F.pad(self._used, (0, missing)), F.pad(self._own, (0, 0, 0, missing))

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        prefix_bias: Tensor,
        own_bias: Tensor | None,
        columns: slice,
        stop: int,
    ) -> Tensor:
        """Attention of (N, C, heads, head_dim) to the prefix and, as far as the bias lets them, to the slot's own first
        `stop` columns, of which these tokens take `columns`."""
        tiles, width, count = self._tiles, self._width, q.shape[1]
        heads, dim = q.shape[2:]
        split = (tiles, width, count, heads, dim)
        q, k, v = (x.view(split).permute(0, 3, 1, 2, 4) for x in (q, k, v))  # (tiles, heads, width, count, dim)
        own_keys, own_values = self._own[layer]
        own_keys[..., columns, :], own_values[..., columns, :] = k, v
        own_keys, own_values = (x.flatten(0, 2)[:, :stop] for x in (own_keys, own_values))
        prefix_keys, prefix_values = self._prefix[layer].flatten(1, 2)
        # One softmax over both parts: a tile's queries against its prefix, a slot's against its own tokens.
        q = q.reshape(tiles * heads, width * count, dim) * scale
        to_prefix = torch.baddbmm(prefix_bias, q, prefix_keys.mT)
        q = q.reshape(-1, count, dim)
        to_own = torch.bmm(q, own_keys.mT) if own_bias is None else torch.baddbmm(own_bias, q, own_keys.mT)
        probs = torch.cat([to_prefix, to_own.view(*to_prefix.shape[:2], stop)], -1).softmax(-1).to(q.dtype)
        from_prefix, from_own = probs.split([prefix_keys.shape[1], stop], -1)
        mixed = torch.bmm(from_prefix, prefix_values).view(-1, count, dim)
        mixed = torch.baddbmm(mixed, from_own.view(-1, count, stop), own_values)
        return mixed.view(tiles, heads, width, count, dim).permute(0, 2, 3, 1, 4).reshape(-1, count, heads, dim)

    def compact(self, alive: Tensor) -> Tensor | None:
        """Gather the live slots (N,) into fewer, if that pays: they are the items now.

        Returns:
            The live slots (n,) in the order of the new items; None if nothing was moved.
        """
        live = (alive & self.filled).nonzero().squeeze(-1)
        layout = _Layout(self._prefix_of_slot[live].cpu().numpy())
        if layout.cost > COMPACT_BELOW * _cost(self._tiles, self._width):
            return None
        self._gather(live, layout)
        return live

    def kept(self, slots: Tensor, kept: Tensor) -> Tensor:
        """Tokens of their own (n,) that `select` would leave the slots."""
        return self._own_before[slots] + kept

    def select(self, slots: Tensor, kept: Tensor) -> None:
        """Make items of the given slots (n,), keeping `kept` (n,) tokens of the last pass and all those before it.

        Slots must come in the order of their prefixes, as a sorted list of slots does; one may be taken repeatedly.
        """
        own_lengths = self.kept(slots, kept)
        self._gather(slots, _Layout(self._prefix_of_slot[slots].cpu().numpy()))
        kept, self._own_lengths = kept[self.source], own_lengths[self.source]
        columns = torch.arange(self._used.shape[1], device=slots.device)
        # Slots had different numbers of tokens before the last pass, and its columns begin behind the longest.
        used = self._used & (columns < (self._start + kept)[:, None])
        order = (~used[:, : self.length]).byte().argsort(dim=1, stable=True).view(self._tiles, 1, self._width, -1, 1)
        for own in self._own[..., : self.length, :]:  # layer by layer: copies of all would be as large as the cache
            own.copy_(own.take_along_dim(order[None], -2))
        self._used = columns < self._own_lengths[:, None]
        self.length = int(own_lengths.max())
        self._gapless = bool(self._used[:, : self.length].all())

    def _gather(self, slots: Tensor, layout: "_Layout") -> None:
        width = self._width
        self._arrange(layout, slots)
        slots = slots[self.source]
        self._prefix_of_slot, self._prefix_lengths = self._prefix_of_slot[slots], self._prefix_lengths[slots]
        self._own_lengths, self._used = self._own_lengths[slots], self._used[slots]
        layers, _, _, heads, _, capacity, dim = self._own.shape
        gathered = self._own.new_empty(layers, 2, self._tiles, heads, self._width, capacity, dim)
        for source, target in zip(self._own[..., : self.length, :], gathered, strict=True):
            # Advanced indices apart from each other put the slots first: (slots, 2, heads, length, dim).
            own = source[:, slots // width, :, slots % width].unflatten(0, (self._tiles, self._width))
            target[..., : self.length, :] = own.permute(2, 0, 3, 1, 4, 5)
        self._own = gathered
        self._select_prefixes(slots[:: self._width] // width)

    def _arrange(self, layout: "_Layout", like: Tensor) -> None:
        self._tiles, self._width = layout.tiles, layout.width
        self.source = torch.from_numpy(layout.source).to(like.device)
        self.filled = torch.from_numpy(layout.filled).to(like.device)

    def _select_prefixes(self, prefix_of_tile: Tensor) -> None:
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

    def _prefix_bias(self, count: int) -> Tensor:
        """(tiles * heads, width * count or 1, L): -inf behind what a slot continues from."""
        return self._bias if self._bias.shape[1] == 1 else self._bias.repeat_interleave(count, 1)

    def _own_bias(self, count: int) -> Tensor | None:
        """(N * heads, count, length + count): -inf for later tokens and for columns that a slot does not use."""
        if count == 1 and self._gapless:
            return None
        device, stop = self.source.device, self.length + count
        hidden = torch.ones(count, stop, dtype=torch.bool, device=device).triu(self.length + 1)[None]
        if not self._gapless:
            itself = torch.eye(count, stop, dtype=torch.bool, device=device).roll(self.length, 1)
            hidden = (hidden | ~self._used[:, None, :stop]) & ~itself  # no softmax over nothing, even in empty slots
        return self._spread_bias(hidden)

    def _spread_bias(self, hidden: Tensor) -> Tensor:
        """(N * heads, count, stop): -inf where `hidden` (N or 1, count, stop) says so, in the order of the own keys."""
        bias = torch.zeros(hidden.shape, dtype=self._own.dtype, device=hidden.device).masked_fill(hidden, -torch.inf)
        bias = bias.expand(len(self.source), -1, -1).unflatten(0, (self._tiles, 1, self._width))
        return bias.expand(-1, self.gpt2.config.n_head, -1, -1, -1).flatten(0, 2)


def _cost(tiles: int, width: int) -> int:
    return tiles * (width + TILE_COST)


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
        self.cost, self.width = min((_cost(int(np.sum(-(-counts // width))), width), width) for width in widths)
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
