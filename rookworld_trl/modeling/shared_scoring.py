"""Log-probs of many completions of few prompts, each distinct prefix computed once, forward and backward.

The samples of a group share their prompt, and often more: the exact computation needs each node of the group's token
trie once (Prefix Grouper, arXiv 2506.05433, does so for the prompt). So tokens are packed without any padding: the
distinct prompts, then the distinct nodes of their completions. Every layer but attention works on the packed tokens;
attention gathers them into tiles: a prompt, and the paths of its completions, each of which sees the prompt's keys and
its own. Log-probs and gradients are those of the padded forward pass up to rounding: a shared node's gradient is the
sum over the completions that pass through it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rookworld_trl.modeling.gpt2 import GPT2, Attend

# Tiles are padded to a common shape while that wastes no more than this share of their attention scores ...
TILE_WASTE = 0.2
# ... or this many scores a head: below it, another round of small kernels costs more.
SMALL_WASTE = 2**13
# Logits alive at a time; with more, the backward pass computes them again, piece by piece.
MAX_LOGITS = 2**25


def per_token_logps(
    gpt2: GPT2,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float | Tensor = 1.0,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each completion token after its prompt, differentiable in the weights that `gpt2` shares.

    Args:
        prompt_ids, prompt_mask: (B, P), 1 for tokens and 0 for padding; positions are counted over the ones.
        completion_ids, completion_mask: (B, C), likewise.
        temperature: logits are divided by it; one for all rows, or (B,) of each. Rows of one prompt share theirs.
        compute_entropy: also return the entropy (nats) of each distribution that a token was drawn from.

    Returns:
        Log-probs and entropies (or None), both (B, C) in float32, 0 where the completion is masked.

    Raises:
        ValueError: a completion follows an empty prompt, so nothing predicts its first token; or rows of one prompt
            have different temperatures, so that what they share has no single distribution.
    """
    arrays = (x.cpu().numpy() for x in (prompt_ids, prompt_mask.bool(), completion_ids, completion_mask.bool()))
    trie = _Trie(*arrays)
    trie.pad(gpt2.blocks.padded(len(trie.tokens)))
    shape, device = completion_ids.shape, gpt2.wte.device
    if not len(trie.tokens):  # a zero that is part of the graph, so that `backward` works on an empty batch too
        zeros = (gpt2.ln_f_bias.sum() * 0).float().expand(shape)
        return zeros, zeros if compute_entropy else None

    def place(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    attend = _attention([tile.to(device) for tile in trie.tiles], place(trie.slot_of_token))
    hidden = gpt2.hidden_states(place(trie.tokens), place(trie.positions), attend)
    hidden = hidden.index_select(0, place(trie.predicting))
    if isinstance(temperature, Tensor):
        divisors = place(trie.of_nodes(temperature.float().cpu().numpy(), shape[1]))[:, None]
    else:
        divisors = torch.full((len(hidden), 1), temperature, device=device)

    def score(states: Tensor, divisors: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax(gpt2.logits(states).float() / divisors, dim=-1)
        entropies = -(logps.exp() * logps).sum(-1) if compute_entropy else logps.new_empty(0)
        return logps[source, target], entropies.index_select(0, source) if compute_entropy else entropies

    logps, entropies = in_pieces(score, hidden, divisors, trie.source, trie.target, gpt2.wte.shape[0])
    cells = place(trie.cell)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(shape.numel()).index_copy(0, cells, values).view(shape)

    return spread(logps), spread(entropies) if compute_entropy else None


def in_pieces(
    score: Callable[..., tuple[Tensor, Tensor]],
    states: Tensor,
    divisors: Tensor,
    source: np.ndarray,
    target: np.ndarray,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Score pairs of a state and a token, so many states at a time that `MAX_LOGITS` logits are alive.

    Args:
        score: takes states (n, H), their divisors (n, 1), and pairs as indices of states and tokens; gives two (k,).
        source: (K,), the state of each pair, ascending.
        target: (K,), its token.
        vocabulary: logits of a state.
    """
    size = max(1, MAX_LOGITS // vocabulary)
    starts = range(0, max(1, len(states)), size)  # of no states one empty piece, which is part of the graph
    cuts = np.searchsorted(source, [*starts, len(states)])
    pieces = []
    for start, first, last in zip(starts, cuts[:-1], cuts[1:], strict=True):
        pairs = (source[first:last] - start, target[first:last])
        arguments = [states[start : start + size], divisors[start : start + size]]
        arguments += [torch.from_numpy(each).to(states.device) for each in pairs]
        whole = len(starts) == 1 or not torch.is_grad_enabled()
        pieces.append(score(*arguments) if whole else checkpoint(score, *arguments, use_reentrant=False))
    one, two = (torch.cat(values) for values in zip(*pieces, strict=True))
    return one, two


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some prompts with `width` paths each, padded to one shape.

    Attributes:
        index: (n, L + width * C), packed token in each slot: the prompt, then its paths one after the other. Slots to
            the right of what is real repeat some token of the same prompt.
        prompt_bias: (n, 1, L), -inf behind the prompt's end; None if all prompts are L long.
        length: C, tokens of the longest path.
    """

    index: Tensor
    prompt_bias: Tensor | None
    prompt_length: int
    width: int
    length: int

    def to(self, device: torch.device) -> "_Tile":
        bias = None if self.prompt_bias is None else self.prompt_bias.to(device)
        return _Tile(self.index.to(device), bias, self.prompt_length, self.width, self.length)


class _Trie:
    """Which tokens must be computed, where each is gathered for attention, and which cell each one predicts.

    A completion's last token predicts nothing, so it is no node. Rows without completion tokens are left out.

    Attributes:
        tokens, positions: (N,), packed: distinct prompts, then distinct nodes of completions.
        predicting: (M,), packed indices of the tokens that predict some completion token.
        source, target, cell: (K,) for each completion token: index into `predicting`, ascending; token id; flat index
            into (B, C).
        tiles: slots for attention.
        slot_of_token: (N,), index into the tiles' flattened slots, prompts before paths, tile after tile.
    """

    def __init__(
        self, prompt_ids: np.ndarray, prompt_mask: np.ndarray, completion_ids: np.ndarray, completion_mask: np.ndarray
    ) -> None:
        rows = np.flatnonzero(completion_mask.any(axis=1))
        prompts, _ = _left_aligned(prompt_ids[rows], prompt_mask[rows])
        completions, columns = _left_aligned(completion_ids[rows], completion_mask[rows])
        if len(rows) and not prompt_mask[rows].any(axis=1).all():
            raise ValueError("a completion follows an empty prompt: begin each prompt with at least one token")
        prompts, group = np.unique(prompts, axis=0, return_inverse=True)
        group = group.reshape(-1)
        # In lexicographic order a row shares with any earlier one at most what it shares with the row before it.
        order = np.lexsort([*completions.T[::-1], group])
        rows, group, completions, columns = rows[order], group[order], completions[order], columns[order]
        real, lengths = completions >= 0, (completions >= 0).sum(axis=1)
        depth = np.arange(completions.shape[1])
        node = depth < lengths[:, None] - 1
        shared = np.logical_and.accumulate(completions[1:] == completions[:-1], axis=1) & node[:-1]
        shared &= (group[1:] == group[:-1])[:, None]
        fresh = node.copy()
        fresh[1:] &= ~shared

        is_prompt, prompt_lengths = prompts >= 0, (prompts >= 0).sum(axis=1)
        offsets = np.cumsum(prompt_lengths) - prompt_lengths
        first_node = int(prompt_lengths.sum())
        # Nodes are numbered row by row; a shared one has the number it got in the last row where it was fresh.
        numbers = np.where(fresh, first_node - 1 + np.cumsum(fresh).reshape(fresh.shape), 0)
        numbers = np.maximum.accumulate(numbers, axis=0)

        self.tokens = np.concatenate([prompts[is_prompt], completions[fresh]])
        positions = prompt_lengths[group, None] + depth
        self.positions = np.concatenate([np.nonzero(is_prompt)[1], positions[fresh]])
        self.predicting = np.concatenate([offsets + prompt_lengths - 1, np.arange(first_node, len(self.tokens))])
        source = np.empty_like(numbers)
        source[:, :1] = group[:, None]
        source[:, 1:] = numbers[:, :-1] - first_node + len(prompts)
        by_source = np.argsort(source[real], kind="stable")
        self.source, self.target = source[real][by_source], completions[real][by_source]
        self.cell = (rows[:, None] * completion_ids.shape[1] + columns)[real][by_source]

        paths = fresh.any(axis=1)
        group, numbers, node, fresh, lengths = (x[paths] for x in (group, numbers, node, fresh, lengths))
        widths, longest = np.bincount(group, minlength=len(prompts)), np.zeros(len(prompts), dtype=np.int64)
        np.maximum.at(longest, group, lengths - 1)
        rank = np.arange(len(group)) - (np.cumsum(widths) - widths)[group]  # of a path in its group
        self.tiles: list[_Tile] = []
        self.slot_of_token = np.empty(len(self.tokens), dtype=np.int64)
        base = 0
        for chosen in _bucket(prompt_lengths, widths, longest):
            tile_of_group = np.full(len(prompts), -1)
            tile_of_group[chosen] = np.arange(len(chosen))
            size, width, length = (int(x[chosen].max()) for x in (prompt_lengths, widths, longest))
            start, columns = offsets[chosen, None], np.arange(size)
            index = start + np.minimum(columns, prompt_lengths[chosen, None] - 1)
            slots = np.arange(base, base + index.size).reshape(index.shape)
            inside = columns < prompt_lengths[chosen, None]
            self.slot_of_token[index[inside]] = slots[inside]
            base += index.size
            mine = tile_of_group[group] >= 0
            where = tile_of_group[group[mine]], rank[mine]
            path_index = np.broadcast_to(start[..., None], (len(chosen), width, length)).copy()
            path_index[where] = np.where(node[mine, :length], numbers[mine, :length], path_index[where])
            slots = np.arange(base, base + path_index.size).reshape(path_index.shape)[where]
            self.slot_of_token[numbers[mine, :length][fresh[mine, :length]]] = slots[fresh[mine, :length]]
            base += path_index.size
            bias = None if inside.all() else torch.from_numpy(np.where(inside, 0.0, -np.inf)[:, None].astype("float32"))
            index = np.concatenate([index, path_index.reshape(len(chosen), -1)], axis=1)
            self.tiles.append(_Tile(torch.from_numpy(index), bias, size, width, length))

    def pad(self, count: int) -> None:
        """Add tokens that predict nothing and that nobody sees, up to so many in all."""
        if len(self.tokens):
            names = ("tokens", "positions", "slot_of_token")
            for name, array in ((name, getattr(self, name)) for name in names):
                setattr(self, name, np.pad(array, (0, count - len(array))))

    def of_nodes(self, values: np.ndarray, columns: int) -> np.ndarray:
        """The rows' values (B,) as values (M,) of the predicting tokens; `columns` is C.

        Raises:
            ValueError: rows that share a token have different values.
        """
        of_targets = values[self.cell // columns]
        result = np.empty(len(self.predicting), dtype=values.dtype)
        result[self.source] = of_targets
        if (result[self.source] != of_targets).any():
            raise ValueError("rows of one prompt have different temperatures: give all samples of a prompt one")
        return result


def _left_aligned(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's real tokens in front and -1 behind them, and the column each token came from; both (B, W)."""
    columns = np.argsort(~mask, axis=1, kind="stable")
    aligned = np.where(np.take_along_axis(mask, columns, 1), np.take_along_axis(ids, columns, 1), -1)
    used = int(mask.sum(axis=1).max(initial=0))
    return aligned[:, :used], columns[:, :used]


def _bucket(prompt_lengths: np.ndarray, widths: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Groups (G,) of like shape together, so that padding them to one shape wastes little."""

    def scores(size: np.ndarray, width: np.ndarray, length: np.ndarray) -> np.ndarray:
        return size**2 + width * length * (size + length)

    shapes = np.stack([prompt_lengths, widths, lengths])
    costs = scores(*shapes)
    buckets: list[list[int]] = []
    for group in np.argsort(-costs, kind="stable"):
        if buckets:
            together = [*buckets[-1], group]
            needed, padded = costs[together].sum(), scores(*shapes[:, together].max(axis=1)) * len(together)
            if padded - needed <= max(TILE_WASTE * padded, SMALL_WASTE):
                buckets[-1] = together
                continue
        buckets.append([group])
    return [np.array(bucket) for bucket in buckets]


def _attention(tiles: list[_Tile], slot_of_token: Tensor) -> Attend:
    """Attention of packed tokens (N, heads, head_dim): causal inside prompts, prompt and path for completions."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        slots: list[Tensor] = []
        for tile in tiles:
            parts = []
            for x in (q, k, v):
                x = x.index_select(0, tile.index.flatten()).unflatten(0, tile.index.shape).transpose(1, 2)
                parts.append(x.split([tile.prompt_length, tile.width * tile.length], 2))
            (prompt_q, path_q), (prompt_k, path_k), (prompt_v, path_v) = parts
            mixed = F.scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, is_causal=True, scale=scale)
            slots.append(mixed.transpose(1, 2).flatten(0, 1))
            if path_q.numel():
                mixed = _attend_paths(tile, path_q * scale, path_k, path_v, prompt_k, prompt_v)
                slots.append(mixed.transpose(1, 2).flatten(0, 1))
        return torch.cat(slots).index_select(0, slot_of_token)

    return attend


def _attend_paths(tile: _Tile, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """One softmax over the prompt and, causally, the path itself; all (n, heads, L or width * C, head_dim)."""
    n, heads, _, dim = q.shape
    size, width, length = tile.prompt_length, tile.width, tile.length
    prompt_k, prompt_v = prompt_k.reshape(n * heads, size, dim), prompt_v.reshape(n * heads, size, dim)
    k, v = (x.reshape(n * heads * width, length, dim) for x in (k, v))
    q = q.reshape(n * heads, width * length, dim)
    # The prompt's keys meet the queries of all paths in one matrix product.
    if tile.prompt_bias is None:
        to_prompt = torch.bmm(q, prompt_k.mT)
    else:
        to_prompt = torch.baddbmm(tile.prompt_bias.repeat_interleave(heads, 0).to(q.dtype), q, prompt_k.mT)
    later = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    to_path = torch.baddbmm(later, q.reshape(-1, length, dim), k.mT)
    probs = torch.cat([to_prompt.view(-1, length, size), to_path], -1).softmax(-1).to(v.dtype)
    on_prompt, on_path = probs.split([size, length], -1)
    mixed = torch.bmm(on_prompt.reshape(n * heads, -1, size), prompt_v).view(-1, length, dim)
    return torch.baddbmm(mixed, on_path, v).view(n, heads, width * length, dim)
