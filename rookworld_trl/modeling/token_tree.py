"""One forward pass over a tree of tokens: a sampled completion, and other continuations as branches of it.

A branch's tokens are appended to the row behind the completion. Each token attends to its ancestors and itself, by an
attention mask (B, 1, S, S), and has the position that its depth says; so it is scored as if it stood in a row of its
own, while what it shares with others is computed once. The model's own forward runs, whatever wraps it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rookworld_trl.modeling.hooks import capture_hidden, without_adapters
from rookworld_trl.modeling.shared_scoring import in_pieces


class TokenTree:
    """One row's tokens: prompt, completion, then the branches of its decisions; every node after its parent."""

    def __init__(self, prompt: Sequence[int], completion: Sequence[int]) -> None:
        self.tokens = [*prompt, *completion]
        self.parents = list(range(-1, len(self.tokens) - 1))
        self.prompt = len(prompt)
        self._children = {(node - 1, token): node for node, token in enumerate(self.tokens)}

    def follow(self, position: int, tokens: Sequence[int]) -> list[int]:
        """The nodes that predict these tokens behind `position` completion tokens; adds those that are not there."""
        node = self.prompt + position - 1
        nodes = [node]
        for token in tokens[:-1]:
            child = self._children.get((node, token))
            if child is None:
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = child
            nodes.append(node)
        return nodes


class Pairs:
    """(row, predicting node, token) triples whose log-probs are wanted."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.nodes: list[int] = []
        self.tokens: list[int] = []

    def add(self, row: int, nodes: Sequence[int], tokens: Sequence[int]) -> range:
        """Their places in the result."""
        start = len(self.tokens)
        self.rows += [row] * len(tokens)
        self.nodes += nodes
        self.tokens += tokens
        return range(start, len(self.tokens))


def tree_logps(
    model: nn.Module,
    head: nn.Module,
    trees: Sequence[TokenTree],
    pairs: Pairs,
    temperature: float | Tensor = 1.0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Log-probs (K,) of all pairs, and the entropies (K,) of the distributions they come from, without gradient; nats.

    Args:
        model: called with token ids, mask and position ids: wrapped or not, with adapters or not.
        head: its output embeddings, applied in float32 to the nodes that predict something.
        temperature: that logits are divided by; one for all rows, or (B,) of each.
    """
    hidden = _hidden(model, trees, torch.device(device))
    if not isinstance(temperature, Tensor):
        temperature = torch.full((len(trees),), temperature)
    return _logps(head, hidden, temperature.to(device), pairs)


def _hidden(model: nn.Module, trees: Sequence[TokenTree], device: torch.device) -> Tensor:
    """Last hidden states (B, S, H) of every node, each of which attends to its ancestors and itself."""
    size = max(len(tree.tokens) for tree in trees)
    ids, positions = np.zeros((2, len(trees), size), dtype=np.int64)
    mask = np.tile(np.eye(size, dtype=bool), (len(trees), 1, 1))
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = tree.tokens
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                positions[row, node] = positions[row, parent] + 1
                mask[row, node] |= mask[row, parent]
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
    return states[0]


def _logps(head: nn.Module, hidden: Tensor, divisors: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probs of all pairs, and the entropies of the distributions they are taken from (without gradient)."""
    device = hidden.device
    weight: Tensor = head.weight  # type: ignore[assignment]
    flat = np.array(pairs.rows) * hidden.shape[1] + np.array(pairs.nodes)
    distinct, source = np.unique(flat, return_inverse=True)
    order = np.argsort(source, kind="stable")
    states = hidden.flatten(0, 1).index_select(0, torch.from_numpy(distinct).to(device))
    row_divisors = divisors[torch.from_numpy(distinct // hidden.shape[1]).to(device), None]

    def score(states: Tensor, divisors: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, enabled=False):
            logits = nn.functional.linear(states.float(), weight.float())
        logps = torch.log_softmax(logits / divisors, dim=-1)
        with torch.no_grad():
            entropies = -(logps.exp() * logps).sum(-1)
        return logps[source, target], entropies[source]

    targets = np.array(pairs.tokens)[order]
    logps, entropies = in_pieces(score, states, row_divisors, source[order], targets, weight.shape[0])
    back = torch.from_numpy(np.argsort(order)).to(device)
    return logps[back], entropies[back]
