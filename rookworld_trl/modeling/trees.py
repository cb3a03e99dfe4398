"""Trees of tokens: sequences that begin alike, every shared token computed once, forward and backward.

The samples of a prompt share it and often more (Prefix Grouper, arXiv 2506.05433, does so for prompts); the actions of
decision points branch off them; supervised rows of one position share sixty tokens of a hundred. Each token attends to
its ancestors and itself and has the position that its depth says, so it is scored as if it stood in a row of its own:
log-probs and gradients are those of the rows one by one, up to rounding.

A tree is laid out depth first: parents before children, and each child's descendants before its next sibling. So j is
an ancestor of i, or i itself, exactly if j <= i < `ends[j]`, the place behind j's last descendant. All trees are packed
without padding, and every layer but attention works token by token. For attention a tree is a trunk, which does not
branch, and the paths behind it, each with its ancestors in front: a trunk's keys meet the queries of all its paths in
one product. Where many short twigs make that dear, the tree stays in one piece.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rookworld_trl.modeling.gpt2 import GPT2, Attend

Tokens = tuple[int, ...]

# Tiles are padded to a common shape while that wastes no more than this share of their attention scores ...
TILE_WASTE = 0.2
# ... or this many scores a head: below it, another round of small kernels costs more.
SMALL_WASTE = 2**13


class TokenTree:
    """Sequences of tokens that begin alike, and how much the log-prob of which token counts where.

    Nodes are numbered as they come, each after its parent; -1 stands for the beginning.

    Attributes:
        prompt: tokens that the tree began with.
        rows: completions in it; what a supervised loss is divided by.
    """

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.prompt, self.rows = len(prompt), 0
        self._children: dict[tuple[int, int], int] = {}
        self._wanted: dict[int, dict[int, float]] = {}  # by node, of each token
        self.read(prompt)

    def read(self, tokens: Sequence[int], node: int = -1) -> int:
        """The node of the last of these tokens behind `node`; those not there are added."""
        return self.follow(node, [*tokens, -1])[-1]

    def follow(self, node: int, tokens: Sequence[int]) -> list[int]:
        """The nodes that predict these tokens behind `node`, which is the first; adds those that are not there."""
        children, nodes = self._children, [node] * bool(tokens)
        for token in tokens[:-1]:  # the last predicts nothing
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = child
            nodes.append(node)
        return nodes

    def want(self, node: int, token: int, weight: float = 1.0) -> None:
        """Count the log-prob of `token` behind `node`, with this weight beside any that it has already."""
        wanted = self._wanted.setdefault(node, {})
        wanted[token] = wanted.get(token, 0.0) + weight

    def write(self, tokens: Sequence[int], node: int, weight: float = 1.0) -> int:
        """As `read`, of tokens that are to be learned."""
        for token in tokens:
            self.want(node, token, weight)
            node = self.read((token,), node)
        return node

    def choose(self, options: Mapping[Tokens, float], chosen: Tokens, node: int, weight: float = 1.0) -> int:
        """As `write` of `chosen`, one of several options, of which each token sequence is right with its share.

        The targets are the shares of the next token, and behind it the shares of what follows it: the distribution
        that a sample of the options teaches in the mean, at once. No option may begin another.
        """
        for depth, token in enumerate(chosen):
            total = sum(options.values())
            for tokens, share in options.items():
                self.want(node, tokens[depth], weight * share / total)
            options = {tokens: share for tokens, share in options.items() if tokens[depth] == token}
            node = self.read((token,), node)
        return node

    def add(self, prompt: Sequence[int], completion: Sequence[int], weight: float = 1.0) -> None:
        """A row: the completion's last token is learned but nothing follows it, so it becomes no node."""
        node = self.write(completion[:-1], self.read(prompt), weight)
        self.want(node, completion[-1], weight)
        self.rows += 1

    def laid_out(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and ends in depth-first order, and the place of each node in it; all (S,)."""
        count = len(self.tokens)
        sizes = [1] * count
        for node in range(count - 1, -1, -1):
            if self.parents[node] >= 0:
                sizes[self.parents[node]] += sizes[node]
        free = [0] * (count + 1)  # where the next child of each node begins; the last one's is the beginning's
        places = [0] * count
        for node, parent in enumerate(self.parents):
            places[node] = free[parent]
            free[node], free[parent] = free[parent] + 1, free[parent] + sizes[node]
        place = np.array(places, dtype=np.int64)
        tokens, ends = np.empty_like(place), np.empty_like(place)
        tokens[place], ends[place] = self.tokens, place + sizes
        return tokens, ends, place

    def arrays(self) -> dict[str, Any]:
        """What `collate` takes: `input_ids` and `ends` (S,), `nodes`, `tokens` and `weights` (K,), and `rows`."""
        tokens, ends, place = self.laid_out()
        pairs = [
            (place[node], token, weight)
            for node, wanted in sorted(self._wanted.items(), key=lambda each: place[each[0]])
            for token, weight in wanted.items()
            if weight
        ]
        nodes, targets, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
        return {
            "input_ids": tokens,
            "ends": ends,
            "nodes": np.array(nodes, dtype=np.int64),
            "tokens": np.array(targets, dtype=np.int64),
            "weights": np.array(weights, dtype=np.float32),
            "rows": self.rows,
        }


class _Layout:
    """How a tree is cut for attention: a trunk and paths behind it, or in one piece where that costs less.

    Args:
        ends: (S,), see above.
        most: tokens that the trunk may have.
        one_piece: it stays in one piece whatever that costs.

    Attributes:
        depths: (S,), the tokens' positions.
        whole: it stays in one piece, the trunk.
        trunk: tokens up to the first that branches, itself included.
        paths: of each the places of its tokens behind the trunk, and how many of them stand in an earlier path.
        shape: the trunk's tokens, paths, and tokens of the longest.
    """

    def __init__(self, ends: np.ndarray, most: int, one_piece: bool) -> None:
        count, places = len(ends), np.arange(len(ends))
        self.depths = places - np.searchsorted(np.sort(ends), places, side="right")  # less those that have ended
        inner = np.flatnonzero(ends < count)
        self.trunk = min(int(inner[0]) if len(inner) else count, most)
        forks = np.flatnonzero(np.diff(self.depths) != 1) + 1
        starts = np.concatenate([[self.trunk] if self.trunk < count else [], forks[forks > self.trunk]]).astype(int)
        stops = np.append(starts[1:], count)[: len(starts)]
        longest = int((self.depths[stops - 1] + 1 - self.trunk).max(initial=0))
        self.shape = (self.trunk, len(starts), longest)
        self.whole, self.paths = one_piece or bool(_scores(*self.shape) > count**2), list[tuple[np.ndarray, int]]()
        if self.whole:
            self.trunk, self.shape = count, (count, 0, 0)
            return
        for start, stop in zip(starts, stops, strict=True):
            before = self.trunk + np.flatnonzero(ends[self.trunk : start] > start)
            self.paths.append((np.concatenate([before, places[start:stop]]), len(before)))


def _scores(trunk: Any, width: Any, length: Any) -> Any:
    """Attention scores a head of trunks and as many paths behind each."""
    return trunk**2 + width * length * (trunk + length)


class _Tile(NamedTuple):
    """Some trees padded to one shape.

    Attributes:
        gathered: (n, L + width * C), packed token in each slot: the trunk, then the paths one after the other. Slots to
            the right of what is real repeat the tree's first token.
        lengths: (n,), of the trunks; None where all are L.
        ends: (n, L), of trees in one piece, 0 behind them; None where trunks do not branch.
        width, length: paths of a tree, and C.
    """

    gathered: Tensor
    lengths: Tensor | None
    ends: Tensor | None
    width: int
    length: int


def pack(
    trees: Sequence[tuple[np.ndarray, np.ndarray, int]],
    padded: Callable[[int], int] = int,
    device: torch.device | str = "cpu",
    one_piece: bool = False,
) -> dict[str, Any]:
    """All trees as packed tokens on a device, for `GPT2.hidden_states` and `attention`.

    Args:
        trees: tokens and ends of each, depth first, and the most that are taken for its trunk.
        padded: how many tokens a pass over so many is padded to.
        one_piece: all trees stay whole, in one tile, so that batches differ in sizes alone and a compiled pass is
            compiled once: where trees are cut, the number of tiles and of paths would each ask for another graph.

    Returns:
        `tokens` and `positions` (N,), the trees' one after the other; `tiles`, `_Tile`s as plain tuples; `slots` (N,),
        where each token stands in the tiles' slots, one after the other.
    """

    def place(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    layouts = [_Layout(ends, most, one_piece) for _, ends, most in trees]
    sizes = [len(tokens) for tokens, _, _ in trees]
    starts, total = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    shapes, whole = np.array([each.shape for each in layouts]), np.array([each.whole for each in layouts])
    slots, base = np.zeros(total, dtype=np.int64), 0
    tiles: list[tuple[Any, ...]] = []
    cut, uncut = np.flatnonzero(~whole), np.flatnonzero(whole)
    for chosen in [uncut] if one_piece else [*_bucket(shapes, cut), *_bucket(shapes, uncut)]:
        trunk, width, length = shapes[chosen].max(axis=0).tolist()
        trunk = _rounded(trunk) if one_piece else trunk
        gathered = np.repeat(starts[chosen, None], trunk + width * length, axis=1)
        lengths, ends = shapes[chosen, 0], np.zeros((len(chosen), trunk), dtype=np.int64)
        for row, tree in enumerate(chosen):
            layout, start, first = layouts[tree], starts[tree], base + row * trunk
            gathered[row, : layout.trunk] += np.arange(layout.trunk)
            ends[row, : layout.trunk] = trees[tree][1][: layout.trunk]
            slots[start : start + layout.trunk] = np.arange(first, first + layout.trunk)
            first = base + len(chosen) * trunk + row * width * length
            for number, (path, known) in enumerate(layout.paths):
                at = trunk + number * length
                gathered[row, at : at + len(path)] += path
                slots[start + path[known:]] = first + number * length + np.arange(known, len(path))
        base += gathered.size
        shorter = place(lengths) if (lengths < trunk).any() else None
        tiles.append((place(gathered), shorter, place(ends) if whole[chosen[0]] else None, width, length))
    more = padded(total) - total  # tokens that predict nothing and that nobody sees
    arrays = {
        "tokens": np.concatenate([tokens for tokens, _, _ in trees]),
        "positions": np.concatenate([each.depths for each in layouts]),
        "slots": slots,
    }
    return {name: place(np.pad(array, (0, more))) for name, array in arrays.items()} | {"tiles": tiles}


def _bucket(shapes: np.ndarray, trees: np.ndarray) -> list[np.ndarray]:
    """Those of the trees that are of like shape (T, 3) together, so that padding them to one shape wastes little."""
    costs = _scores(*shapes.T)
    buckets: list[list[int]] = []
    for tree in trees[np.argsort(-costs[trees], kind="stable")]:
        if buckets:
            together = [*buckets[-1], tree]
            needed, padded = costs[together].sum(), _scores(*shapes[together].max(axis=0)) * len(together)
            if padded - needed <= max(TILE_WASTE * padded, SMALL_WASTE):
                buckets[-1] = together
                continue
        buckets.append([tree])
    return [np.array(bucket) for bucket in buckets]


def attention(packed: Mapping[str, Any], heads: int) -> Attend:
    """Attention of packed tokens (N, heads, head_dim): each sees its ancestors and itself."""
    tiles = [_tile_attention(_Tile._make(tile), heads) for tile in packed["tiles"]]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs = [output for tile in tiles for output in tile(q, k, v, scale)]
        return torch.cat(outputs).index_select(0, packed["slots"])

    return attend


def _tile_attention(tile: _Tile, heads: int) -> Callable[[Tensor, Tensor, Tensor, float], list[Tensor]]:
    """What the tokens in a tile's slots make of each other: first the trunks', then the paths'."""
    below, length, device = tile.width * tile.length, tile.length, tile.gathered.device
    size = tile.gathered.shape[1] - below
    places, columns = torch.arange(size, device=device), torch.arange(length, device=device)
    seen = None
    if tile.ends is not None:  # what is behind a tree sees itself: no softmax over nothing
        seen = (places <= places[:, None]) & (places[:, None] < tile.ends[:, None])
        seen |= places == places[:, None]

    @cache
    def biases(dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """-inf where trunks' tokens see nothing, and paths' in the trunk (None: all is seen) and in the path."""
        zero = torch.zeros((), dtype=dtype, device=device)
        in_trunk = places > places[:, None] if seen is None else ~seen.repeat_interleave(heads, 0)
        later = zero.masked_fill(columns > columns[:, None], -torch.inf)
        if tile.lengths is None:
            return zero.masked_fill(in_trunk, -torch.inf), None, later
        behind = (places >= tile.lengths[:, None]).repeat_interleave(heads, 0)[:, None]
        return zero.masked_fill(in_trunk, -torch.inf), zero.masked_fill(behind, -torch.inf), later

    def attend_trunk(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # torch's fused attention is faster in float32 (`benchmarks/results/attention.json`); in bf16 its backward pass
        # is slow on a CPU. On a GPU it is taken since it keeps no probabilities.
        if q.dtype == torch.float32 or device.type == "cuda":
            mask = None if seen is None else seen[:, None]
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        probs = torch.baddbmm(biases(q.dtype)[0], flat_q, flat_k.mT, alpha=scale).softmax(-1)
        return torch.bmm(probs.to(v.dtype), flat_v).view(q.shape)

    def attend_paths(q: Tensor, k: Tensor, v: Tensor, trunk_k: Tensor, trunk_v: Tensor, scale: float) -> Tensor:
        """One softmax over the trunk and, causally, the path itself; all (n, heads, L or width * C, head_dim)."""
        shape, (_, trunk_bias, later) = q.shape, biases(q.dtype)
        q, trunk_k, trunk_v = (q * scale).flatten(0, 1), trunk_k.flatten(0, 1), trunk_v.flatten(0, 1)
        k, v = (x.reshape(-1, length, shape[3]) for x in (k, v))
        # The trunk's keys meet the queries of all paths in one matrix product.
        to_trunk = torch.bmm(q, trunk_k.mT) if trunk_bias is None else torch.baddbmm(trunk_bias, q, trunk_k.mT)
        to_path = torch.baddbmm(later, q.reshape(-1, length, shape[3]), k.mT)
        probs = torch.cat([to_trunk.view(-1, length, size), to_path], -1).softmax(-1).to(v.dtype)
        on_trunk, on_path = probs.split([size, length], -1)
        mixed = torch.bmm(on_trunk.reshape(len(trunk_v), -1, size), trunk_v).view(-1, length, shape[3])
        return torch.baddbmm(mixed, on_path, v).view(shape)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
        parts = []
        for x in (q, k, v):
            x = x.index_select(0, tile.gathered.flatten()).unflatten(0, tile.gathered.shape).transpose(1, 2)
            parts.append(x.split([size, below], 2))
        (trunk_q, path_q), (trunk_k, path_k), (trunk_v, path_v) = parts
        outputs = [attend_trunk(trunk_q, trunk_k, trunk_v, scale)]
        if below:
            outputs.append(attend_paths(path_q, path_k, path_v, trunk_k, trunk_v, scale))
        return [each.transpose(1, 2).flatten(0, 1) for each in outputs]

    return attend


def _rounded(size: int) -> int:
    """Up to a multiple of 16, from a thousand on of 256: torch keeps kernels of each shape, a gigabyte of all."""
    step = 16 if size < 1000 else 256
    return -(-size // step) * step


def collate(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of trees' `arrays` for `weighted_nats`: that of `pack`, and what the trees want.

    Returns:
        Also `predicting` (M,), the tokens that predict something; `source` (K,) index into these, `target` (K,) and
        `weights` (K,): what they predict; `rows` (B,); `size`, tokens without padding.
    """
    sizes = [len(tree["input_ids"]) for tree in trees]
    starts = np.cumsum([0, *sizes[:-1]])
    nodes = np.concatenate([np.asarray(tree["nodes"]) + start for tree, start in zip(trees, starts, strict=True)])
    predicting, source = np.unique(nodes, return_inverse=True)
    arrays = {
        "predicting": np.pad(predicting, (0, _rounded(len(predicting)) - len(predicting))),
        "source": source.reshape(-1),
        "target": np.concatenate([tree["tokens"] for tree in trees]),
        "weights": np.concatenate([tree["weights"] for tree in trees]).astype(np.float32),
        "rows": np.array([tree["rows"] for tree in trees]),
        "size": np.array(sum(sizes)),
    }
    laid_out = [(np.asarray(tree["input_ids"]), np.asarray(tree["ends"])) for tree in trees]
    packed = pack([(tokens, ends, len(ends)) for tokens, ends in laid_out], _rounded, one_piece=True)
    return packed | {name: torch.from_numpy(array) for name, array in arrays.items()}


def weighted_nats(gpt2: GPT2, batch: Mapping[str, Any]) -> Tensor:
    """The sum of -weight * log p(token) over all that a batch's trees want; nats, differentiable in the weights.

    Under autocast products are computed in its precision, attention's and the head's too, and the softmax over tokens
    in float32.
    """
    hidden = gpt2.hidden_states(batch["tokens"], batch["positions"], attention(batch, gpt2.config.n_head))
    logits = F.linear(hidden.index_select(0, batch["predicting"]), gpt2.wte)
    logps = logits.float().log_softmax(-1)[batch["source"], batch["target"]]
    return -(logps * batch["weights"]).sum()
