"""One forward pass over trees of tokens: prompts, completions sampled for each, and other continuations as branches.

Each token attends to its ancestors and itself and has the position that its depth says; so it is scored as if it stood
in a row of its own, while what several share is computed once. Where a model's weights can be used past its own forward
pass (`GPT2.sharing`), all trees are packed without padding; any other model gets one row a tree and an attention mask
(B, 1, S, S), so that whatever wraps it runs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rookworld_trl.modeling.gpt2 import GPT2, Attend
from rookworld_trl.modeling.hooks import capture_hidden, without_adapters
from rookworld_trl.modeling.shared_scoring import in_pieces

ALIKE = 0.95  # trees of at least this share of the largest's tokens are padded to its size


class TokenTree:
    """Sequences of tokens that begin alike; every node after its parent, the first ones the prompt's."""

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}
        self.prompt = len(prompt)
        self.read(prompt)

    def read(self, tokens: Sequence[int], node: int = -1) -> int:
        """The node of the last of these tokens behind `node` (-1: the beginning); those not there are added."""
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = child
        return node

    def follow(self, node: int, tokens: Sequence[int]) -> list[int]:
        """The nodes that predict these tokens behind `node`, which is the first; adds those that are not there."""
        nodes = [node] * bool(tokens)
        for token in tokens[:-1]:  # the last predicts nothing
            nodes.append(self.read((token,), nodes[-1]))
        return nodes


class Pairs:
    """(tree, predicting node, token) triples whose log-probs are wanted."""

    def __init__(self) -> None:
        self.trees: list[int] = []
        self.nodes: list[int] = []
        self.tokens: list[int] = []

    def add(self, tree: int, nodes: Sequence[int], tokens: Sequence[int]) -> range:
        """Their places in the result."""
        start = len(self.tokens)
        self.trees += [tree] * len(tokens)
        self.nodes += nodes
        self.tokens += tokens
        return range(start, len(self.tokens))


class States(NamedTuple):
    """Last hidden states (M, H) of all trees' nodes, and where each tree's begin (T,)."""

    hidden: Tensor
    starts: np.ndarray


def states_of(model: nn.Module | GPT2, trees: Sequence[TokenTree], device: torch.device | str) -> States:
    """One forward pass over all trees.

    Args:
        model: called with token ids, mask and position ids: wrapped or not, with adapters or not; or weights alone.
    """
    device = torch.device(device)
    if isinstance(model, GPT2):
        return _packed(model, trees, device)
    positions, mask = _ancestors(trees)
    size = mask.shape[1]
    ids = np.zeros((len(trees), size), dtype=np.int64)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = tree.tokens
    attention: Any = torch.from_numpy(mask)[:, None].to(device)
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    if without_adapters(inner).config._attn_implementation != "sdpa":  # eager attention adds the mask
        attention = torch.zeros(attention.shape, device=device).masked_fill(~attention, torch.finfo(torch.float32).min)
    with capture_hidden(inner) as states:
        model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=attention,
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
            logits_to_keep=1,
        )
    return States(states[0].flatten(0, 1), np.arange(len(trees)) * size)


def _ancestors(trees: Sequence[TokenTree]) -> tuple[np.ndarray, np.ndarray]:
    """Positions (T, S) and what each place attends to (T, S, S), itself included, also where there is only padding."""
    size = max(len(tree.tokens) for tree in trees)
    positions = np.zeros((len(trees), size), dtype=np.int64)
    seen = np.tile(np.eye(size, dtype=bool), (len(trees), 1, 1))
    for row, tree in enumerate(trees):
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                positions[row, node] = positions[row, parent] + 1
                seen[row, node] |= seen[row, parent]
    return positions, seen


def _packed(gpt2: GPT2, trees: Sequence[TokenTree], device: torch.device) -> States:
    """Trees of like size stand together and are padded to one size for attention alone."""
    order = sorted(range(len(trees)), key=lambda tree: -len(trees[tree].tokens))
    lengths = [len(trees[tree].tokens) for tree in order]
    starts, begin = np.zeros(len(trees), dtype=np.int64), 0
    starts[order] = np.cumsum(lengths) - lengths
    positions: list[np.ndarray] = []
    groups: list[Attend] = []
    while begin < len(order):
        end = begin + sum(length >= ALIKE * lengths[begin] for length in lengths[begin:])
        depths, seen = _ancestors([trees[tree] for tree in order[begin:end]])
        slots = np.flatnonzero(np.arange(lengths[begin]) < np.array(lengths[begin:end])[:, None])
        positions.append(depths.reshape(-1)[slots])
        mask, where = (torch.from_numpy(each).to(device) for each in (seen, slots))
        groups.append(packed_attention(mask, where, gpt2.config.n_head))
        begin = end
    real = sum(lengths)
    padding = gpt2.blocks.padded(real) - real  # tokens that nobody sees, so that compiled blocks meet few shapes
    counts = [*(len(each) for each in positions), padding]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        *parts, (_, _, unseen) = zip(q.split(counts), k.split(counts), v.split(counts), strict=True)
        mixed = [group(layer, *mine, scale) for group, mine in zip(groups, parts, strict=True)]
        return torch.cat([*mixed, unseen])

    ids = np.concatenate([trees[tree].tokens for tree in order])
    tokens, places = (
        torch.from_numpy(np.pad(each, (0, padding))).to(device) for each in (ids, np.concatenate(positions))
    )
    return States(gpt2.hidden_states(tokens, places, attend), starts)


def fused_pays(x: Tensor) -> bool:
    """Whether torch's fused attention is faster under a tree's mask, forward and backward.

    On a CPU (`benchmarks/results/attention.json`) it is in float32; in bf16 its backward pass is slow there. On a GPU
    it is taken since it keeps no (S, S) probabilities; its speed there `make gpu` measures.
    """
    return x.dtype == torch.float32 or x.device.type == "cuda"


def packed_attention(seen: Tensor, slots: Tensor, heads: int) -> Attend:
    """Attention of packed tokens (N, heads, head_dim), spread over (B, S) and padded there alone.

    Args:
        seen: (B, S, S) bool, what each place attends to.
        slots: (N,), where each token stands in (B, S), flattened; ascending.
    """
    count, size = seen.shape[:2]
    whole = len(slots) == count * size
    unseen = ~seen.any(-1)  # padding, which then sees everything: no softmax over nothing
    bias: dict[torch.dtype, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        width = q.shape[-1]

        def spread(x: Tensor) -> Tensor:
            if not whole:
                x = x.new_zeros(count * size, heads, width).index_copy(0, slots, x)
            return x.view(count, size, heads, width).transpose(1, 2)

        def packed(mixed: Tensor) -> Tensor:
            mixed = mixed.transpose(1, 2).reshape(-1, heads, width)
            return mixed if whole else mixed.index_select(0, slots)

        if fused_pays(q):
            mask = seen[:, None] | unseen[:, None, :, None]
            return packed(F.scaled_dot_product_attention(spread(q), spread(k), spread(v), mask, scale=scale))
        if not bias:
            # No softmax over nothing, since padding sees no token: a large number instead of infinity, with as much
            # room below it for what queries and keys add, in float16 too.
            hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
            hidden.masked_fill_(~seen, torch.finfo(q.dtype).min / 2)
            bias[q.dtype] = hidden.repeat_interleave(heads, 0)
        flat_q, flat_k, flat_v = (spread(x).reshape(-1, size, width) for x in (q, k, v))
        probs = torch.baddbmm(bias[q.dtype], flat_q, flat_k.mT, alpha=scale).softmax(-1)
        return packed(torch.bmm(probs.to(v.dtype), flat_v).view(count, heads, size, width))

    return attend


def tree_logps(
    head: nn.Module, states: States, divisors: Tensor, pairs: Pairs, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs (K,) of all pairs, and the entropies (K,) of the distributions they come from; nats.

    Args:
        head: the output embeddings, applied in float32 to the nodes that predict something.
        divisors: (T,), temperatures that the logits of each tree are divided by.
        entropy_gradient: entropies are differentiable too, which keeps the distributions for the backward pass.
    """
    device = states.hidden.device
    weight: Tensor = head.weight  # type: ignore[assignment]
    trees, nodes, tokens = (np.array(each, dtype=np.int64) for each in (pairs.trees, pairs.nodes, pairs.tokens))
    distinct, first, source = np.unique(states.starts[trees] + nodes, return_index=True, return_inverse=True)
    order = np.argsort(source, kind="stable")
    hidden = states.hidden.index_select(0, torch.from_numpy(distinct).to(device))
    divisors = divisors.to(device)[torch.from_numpy(trees[first]).to(device), None]

    def score(states: Tensor, divisors: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, enabled=False):
            logits = nn.functional.linear(states.float(), weight.float())
        logps = torch.log_softmax(logits / divisors, dim=-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = -(logps.exp() * logps).sum(-1)
        return logps[source, target], entropies[source]

    logps, entropies = in_pieces(score, hidden, divisors, source[order], tokens[order], weight.shape[0])
    back = torch.from_numpy(np.argsort(order)).to(device)
    return logps[back], entropies[back]
