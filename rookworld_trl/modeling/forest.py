"""Log-probs of a batch of completions, and of whatever else may stand in them, by one forward pass over their trees.

Where a model's weights can be used past its own forward pass (`GPT2.sharing`), the trees are packed
(`rookworld_trl.modeling.trees`). Any other model gets one row a tree and an attention mask (B, 1, S, S), so that
whatever wraps it runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.hooks import capture_hidden, without_adapters
from rookworld_trl.modeling.trees import TokenTree, attention, pack

# Logits alive at a time; with more, the backward pass computes them again, piece by piece.
MAX_LOGITS = 2**25


class Forest:
    """The trees of a batch of completions, one for each distinct prompt at its temperature, and wanted log-probs.

    Args:
        prompt_ids, prompt_mask: (B, P), 1 for tokens and 0 for padding; positions are counted over the ones.
        completion_ids, completion_mask: (B, C), likewise. Their log-probs are the first that are wanted, row by row.
        temperature: logits are divided by it; one for all rows, or (B,) of each.

    Attributes:
        trees: of each tree the temperature and the tokens.
        paths: the tree of each row, and the nodes that predict its completion.

    Raises:
        ValueError: a completion follows an empty prompt, so nothing predicts its first token.
    """

    def __init__(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> None:
        self.device, self.shape = completion_ids.device, completion_ids.shape
        sides = ((prompt_ids, prompt_mask), (completion_ids, completion_mask))
        prompts, completions = (
            [row[real].tolist() for row, real in zip(ids.cpu().numpy(), mask.bool().cpu().numpy(), strict=True)]
            for ids, mask in sides
        )
        if not all(prompts):
            raise ValueError("a completion follows an empty prompt: begin each prompt with at least one token")
        temperatures = temperature.tolist() if isinstance(temperature, Tensor) else [temperature] * len(prompts)
        self.trees: list[tuple[float, TokenTree]] = []
        self.paths: list[tuple[int, list[int]]] = []
        self._pairs: tuple[list[int], list[int], list[int]] = ([], [], [])  # trees, predicting nodes, tokens
        numbers: dict[tuple[float, ...], int] = {}
        for each, prompt, completion in zip(temperatures, prompts, completions, strict=True):
            number = numbers.setdefault((each, *prompt), len(numbers))
            if number == len(self.trees):
                self.trees.append((each, TokenTree(prompt)))
            self.paths.append((number, self.want(number, len(prompt) - 1, completion)))
        self.cells = completion_mask.bool().flatten().nonzero().squeeze(-1)

    def want(self, tree: int, node: int, tokens: Sequence[int]) -> list[int]:
        """The log-probs of these tokens behind a node are wanted next; returns the nodes that predict them."""
        nodes = self.trees[tree][1].follow(node, tokens)
        for have, more in zip(self._pairs, ([tree] * len(tokens), nodes, tokens), strict=True):
            have += more
        return nodes

    def logps(
        self,
        model: nn.Module | GPT2,
        head: Tensor,
        entropies: bool = True,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (K,) of all that is wanted, and the entropies (K,) of the distributions they come from; nats.

        Args:
            model: called with token ids, mask and position ids: wrapped or not, with adapters or not; or its weights
                alone, which are faster.
            head: output embeddings (V, H), applied in float32 to the nodes that predict something.
            entropies: else there are none.
            entropy_gradient: entropies are differentiable too, which keeps the distributions for the backward pass.
        """
        laid_out, prompts = [tree.laid_out() for _, tree in self.trees], [tree.prompt for _, tree in self.trees]
        trees_of = [(tokens, ends, prompt) for (tokens, ends, _), prompt in zip(laid_out, prompts, strict=True)]
        hidden, starts = _states(model, trees_of, self.device)
        trees, nodes, tokens = (np.array(each, dtype=np.int64) for each in self._pairs)
        begin = np.cumsum([0, *(len(place) for _, _, place in laid_out)])[trees]
        places = starts[trees] + np.concatenate([place for _, _, place in laid_out])[begin + nodes]
        distinct, chosen, source = np.unique(places, return_index=True, return_inverse=True)
        order = np.argsort(source, kind="stable")
        divisors = torch.tensor([temperature for temperature, _ in self.trees], device=self.device)
        divisors = divisors[torch.from_numpy(trees[chosen]).to(self.device), None]

        def score(states: Tensor, divisors: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device.type, enabled=False):
                logits = F.linear(states.float(), head.float())
            logps = torch.log_softmax(logits / divisors, dim=-1)
            chosen, of_states = logps[source, target], logps.new_empty(0)
            if entropies:
                with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                    of_states = -(logps.exp() * logps).sum(-1)[source]
            return chosen, of_states

        states = hidden.index_select(0, torch.from_numpy(distinct).to(self.device))
        size, source, tokens = max(1, MAX_LOGITS // len(head)), source[order], tokens[order]
        firsts = range(0, max(1, len(states)), size)  # of no states one empty piece, which is part of the graph
        cuts, pieces = np.searchsorted(source, [*firsts, len(states)]), []
        whole = len(firsts) == 1 or not torch.is_grad_enabled()
        for start, first, last in zip(firsts, cuts[:-1], cuts[1:], strict=True):
            pairs = (torch.from_numpy(each[first:last]).to(self.device) for each in (source - start, tokens))
            piece = (states[start : start + size], divisors[start : start + size], *pairs)
            pieces.append(score(*piece) if whole else checkpoint(score, *piece, use_reentrant=False))
        found, of_states = (torch.cat(values) for values in zip(*pieces, strict=True))
        back = torch.from_numpy(np.argsort(order)).to(self.device)
        return found.index_select(0, back), of_states.index_select(0, back) if entropies else of_states

    def of_completions(self, values: Tensor) -> Tensor:
        """Values (K,) of all that is wanted at the completions' tokens (B, C), 0 elsewhere."""
        mine = values[: len(self.cells)]
        return values.new_zeros(self.shape.numel()).index_copy(0, self.cells, mine).view(self.shape)


def _states(
    model: nn.Module | GPT2, trees: Sequence[tuple[np.ndarray, np.ndarray, int]], device: torch.device
) -> tuple[Tensor, np.ndarray]:
    """Last hidden states (N, H) of all trees' tokens, depth first, and where those of each begin (T,)."""
    sizes = [len(tokens) for tokens, _, _ in trees]
    if isinstance(model, GPT2):
        packed = pack(trees, model.blocks.padded, device)
        attend = attention(packed, model.config.n_head)
        return model.hidden_states(packed["tokens"], packed["positions"], attend), np.cumsum([0, *sizes[:-1]])
    size = max(sizes)
    ids, ends = np.zeros((2, len(trees), size), dtype=np.int64)
    for row, (tokens, last, _) in enumerate(trees):
        ids[row, : len(tokens)], ends[row, : len(tokens)] = tokens, last
    places = np.arange(size)
    seen = (places <= places[:, None]) & (places[:, None] < ends[:, None])
    positions = np.maximum(seen.sum(-1) - 1, 0)
    attention_mask = torch.from_numpy(seen | np.eye(size, dtype=bool))[:, None].to(device)  # padding sees itself
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    if without_adapters(inner).config._attn_implementation != "sdpa":  # eager attention adds the mask
        zeros = torch.zeros(attention_mask.shape, device=device)
        attention_mask = zeros.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    with capture_hidden(inner) as states:
        model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=attention_mask,
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
            logits_to_keep=1,
        )
    return states[0].flatten(0, 1), np.arange(len(trees)) * size


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
        prompt_ids, prompt_mask, completion_ids, completion_mask, temperature: see `Forest`.
        compute_entropy: also return the entropy (nats) of each distribution that a token was drawn from.

    Returns:
        Log-probs and entropies (or None), both (B, C) in float32, 0 where the completion is masked.
    """
    forest = Forest(prompt_ids, prompt_mask, completion_ids, completion_mask, temperature)
    logps, entropies = forest.logps(gpt2, gpt2.wte, compute_entropy, entropy_gradient=True)
    return forest.of_completions(logps), forest.of_completions(entropies) if compute_entropy else None
