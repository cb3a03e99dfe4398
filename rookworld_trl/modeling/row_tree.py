"""Rows that begin alike as one tree of tokens, and the loss of a batch of such trees, computed without padding.

Supervised rows of one position share its tokens, sixty of a hundred; and where several moves are right, each with its
share, their continuations share all that stands before. A tree holds every token once, parents before children and each
child's descendants before its next sibling. So node j is an ancestor of i, or i itself, exactly if j <= i < `ends[j]`,
where `ends[j]` is the node behind j's last descendant: that is the attention mask, and the number of ancestors is the
position. Every layer but attention works on the packed tokens of all trees; log-probs and gradients are those of the
rows one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.token_tree import TokenTree, packed_attention

Tokens = tuple[int, ...]


class RowTree(TokenTree):
    """Also knows how much the log-prob of which token counts where.

    Attributes:
        rows: completions in it; what the loss is divided by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self._wanted: dict[int, dict[int, float]] = {}  # by node, of each token

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

    def arrays(self) -> dict[str, Any]:
        """What `pack` takes: `input_ids` and `ends` (S,), `nodes`, `tokens` and `weights` (K,), and `rows`."""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        order: list[int] = []
        ends = np.empty(len(self.tokens), dtype=np.int64)
        # Depth first; a node is met again, as its complement, when its descendants are done.
        place: dict[int, int] = {}
        stack = children.get(-1, [])[::-1]
        while stack:
            node = stack.pop()
            if node < 0:
                ends[place[~node]] = len(order)
                continue
            place[node] = len(order)
            order.append(node)
            stack += [~node, *reversed(children.get(node, ()))]
        pairs = [
            (place[node], token, weight)
            for node in order
            for token, weight in self._wanted.get(node, {}).items()
            if weight
        ]
        nodes, tokens, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
        return {
            "input_ids": np.array(self.tokens, dtype=np.int64)[order],
            "ends": ends,
            "nodes": np.array(nodes, dtype=np.int64),
            "tokens": np.array(tokens, dtype=np.int64),
            "weights": np.array(weights, dtype=np.float32),
            "rows": self.rows,
        }


def pack(trees: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of trees for `weighted_nats`.

    Returns:
        `input_ids` (N,), the tokens of all trees; `ends` (B, S), padded with 0; `slots` (N,), where each token stands
        in (B, S), flattened; `predicting` (M,), the tokens that predict something; `source` (K,) index into these,
        `target` (K,) and `weights` (K,): what they predict; `rows` (B,).
    """
    lengths = np.array([len(tree["input_ids"]) for tree in trees])
    starts, size = np.cumsum(lengths) - lengths, int(lengths.max())
    ends = np.zeros((len(trees), size), dtype=np.int64)
    for row, tree in enumerate(trees):
        ends[row, : lengths[row]] = tree["ends"]
    nodes = np.concatenate([np.asarray(tree["nodes"]) + start for tree, start in zip(trees, starts, strict=True)])
    predicting, source = np.unique(nodes, return_inverse=True)
    arrays = {
        "input_ids": np.concatenate([tree["input_ids"] for tree in trees]),
        "ends": ends,
        "slots": np.flatnonzero(np.arange(size) < lengths[:, None]),
        "predicting": predicting,
        "source": source.reshape(-1),
        "target": np.concatenate([tree["tokens"] for tree in trees]),
        "weights": np.concatenate([tree["weights"] for tree in trees]).astype(np.float32),
        "rows": np.array([tree["rows"] for tree in trees]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def weighted_nats(gpt2: GPT2, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of -weight * log p(token) over all that a batch's trees want; nats, differentiable in the weights.

    Under autocast products are computed in its precision, attention's and the head's too, and the softmax over tokens
    in float32.
    """
    ends, slots = batch["ends"], batch["slots"]
    columns = torch.arange(ends.shape[1], device=ends.device)
    seen = (columns <= columns[:, None]) & (columns[:, None] < ends[:, None])  # (B, S, S)
    positions = seen.sum(-1).flatten()[slots] - 1
    hidden = gpt2.hidden_states(batch["input_ids"], positions, packed_attention(seen, slots, gpt2.config.n_head))
    logits = F.linear(hidden.index_select(0, batch["predicting"]), gpt2.wte)
    logps = logits.float().log_softmax(-1)[batch["source"], batch["target"]]
    return -(logps * batch["weights"]).sum()
