"""GPT-2 in plain PyTorch: a function of weights and tokens that owns no parameters.

It runs on the live parameters of the model that trains, so there is nothing to synchronise: `shared_prefix` samples
with it, `trees` computes the loss's log-probs. Both are held to transformers' own forward pass.

Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned
positions, output head tied to the token embedding. Deviation: no dropout anywhere, whatever the config says.
Weights keep the checkpoints' names and layout: linear maps are stored (in, out), as `x @ W + b` wants them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The tanh approximation of GELU under its three names; RookWorld-LM and OpenAI's GPT-2 say `gelu_new`.
ACTIVATIONS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")

# How queries meet keys is the one thing that differs between prefill, decoding and scoring:
# (layer, q, k, v, scale) -> output, with q, k, v and the output of shape (batch, length, heads, head_dim).
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class Layer(NamedTuple):
    """The tensors of one block."""

    ln_1_weight: Tensor
    ln_1_bias: Tensor
    attn_weight: Tensor
    attn_bias: Tensor
    attn_proj_weight: Tensor
    attn_proj_bias: Tensor
    ln_2_weight: Tensor
    ln_2_bias: Tensor
    fc_weight: Tensor
    fc_bias: Tensor
    fc_proj_weight: Tensor
    fc_proj_bias: Tensor


# Their names in a checkpoint, in the same order.
BLOCK = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def check_config(config: Any) -> None:
    """Refuse every GPT-2 variant that this module does not compute.

    Raises:
        ValueError: naming the field of the config, its value and what is supported.
    """
    no, yes = (False,), (True,)
    supported = {"model_type": ("gpt2",), "activation_function": ACTIVATIONS, "tie_word_embeddings": yes}
    supported |= {"add_cross_attention": no, "reorder_and_upcast_attn": no}
    supported |= {"scale_attn_weights": yes, "scale_attn_by_inverse_layer_idx": no}
    for field, values in supported.items():
        if (value := getattr(config, field)) not in values:
            raise ValueError(f"{field} is {value!r}: only {' or '.join(map(str, values))} is supported")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def before_attention(x: Tensor, layer: Layer, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., heads, head_dim) of a block's input (..., n_embd)."""
    width = x.shape[-1]
    normed = F.layer_norm(x, (width,), layer.ln_1_weight, layer.ln_1_bias, eps)
    q, k, v = _affine(normed, layer.attn_weight, layer.attn_bias).unflatten(-1, (3, heads, width // heads)).unbind(-3)
    return q, k, v


def after_attention(x: Tensor, mixed: Tensor, layer: Layer, eps: float) -> Tensor:
    """A block's output (..., n_embd) from its input and what attention made of it, (..., heads, head_dim)."""
    x = x + _affine(mixed.flatten(-2), layer.attn_proj_weight, layer.attn_proj_bias)
    normed = F.layer_norm(x, x.shape[-1:], layer.ln_2_weight, layer.ln_2_bias, eps)
    inner = F.gelu(_affine(normed, layer.fc_weight, layer.fc_bias), approximate="tanh")
    return x + _affine(inner, layer.fc_proj_weight, layer.fc_proj_bias)


class Blocks(NamedTuple):
    """What computes a block around its attention, token by token; see `compile_blocks` for the compiled ones.

    Attributes:
        padded: how many tokens a pass over so many is padded to, so that shapes come again.
    """

    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
    after: Callable[..., Tensor] = after_attention
    padded: Callable[[int], int] = int


EAGER = Blocks()

MULTIPLE = 64  # tokens that compiled passes are padded to a multiple of: tensor cores like it, and few graphs are made


def compile_blocks(options: Mapping[str, Any]) -> Blocks:
    """Blocks by `torch.compile`, for passes whose number of tokens differs from batch to batch.

    Attention stays as it is: its kernels are fused already, and its tiles have too many shapes. What is left of a block
    works token by token, so all layers of a pass share one graph, and only the number of tokens can make another. A
    code object has at most `torch._dynamo.config.recompile_limit` graphs, and runs as it is written for whatever comes
    after.

    Args:
        options: its arguments.
    """
    before, after = torch.compile(before_attention, **options), torch.compile(after_attention, **options)
    return Blocks(before, after, next_multiple)


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    from torch._dynamo.utils import counters  # imported where something is compiled

    return counters["stats"]["unique_graphs"]


def next_multiple(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


class GPT2:
    """GPT-2's forward pass over a mapping of weights, which are used in place and never copied.

    Args:
        config: a transformers `GPT2Config` or anything with its fields.
        weights: a `GPT2LMHeadModel`'s parameters by name.
        blocks: what computes them.

    Raises:
        ValueError: the config is of an unsupported variant, or a weight is missing or unknown.
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor], blocks: Blocks = EAGER) -> None:
        check_config(config)
        self.config, self.blocks = config, blocks
        ends, blocks_of = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"), range(config.n_layer)
        names = {f"transformer.{name}" for name in (*ends, *(f"h.{i}.{name}" for i in blocks_of for name in BLOCK))}
        if unlike := sorted(names ^ weights.keys()):
            raise ValueError(f"the weights are not those of a plain GPT-2: {', '.join(unlike[:4])} missing or unknown")
        self.wte, self.wpe, self.ln_f_weight, self.ln_f_bias = (weights[f"transformer.{name}"] for name in ends)
        self.layers = [Layer(*(weights[f"transformer.h.{i}.{name}"] for name in BLOCK)) for i in blocks_of]
        self.head_dim = config.n_embd // config.n_head
        self.scale = self.head_dim**-0.5

    @classmethod
    def sharing(cls, model: nn.Module, blocks: Blocks = EAGER) -> "GPT2":
        """The same function on the live parameters of a transformers `GPT2LMHeadModel`: updates show at once.

        Raises:
            ValueError: the model carries adapters, is wrapped or sharded, or is no GPT-2.
        """
        names = dict(model.named_parameters())
        if any("lora_" in name for name in names):
            raise ValueError("the model carries unmerged LoRA adapters: call merge_and_unload() on it first")
        return cls(model.config, names, blocks)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (B, T, n_embd) of tokens (B, T) at the given positions (B, T) or (T,)."""
        heads, eps = self.config.n_head, self.config.layer_norm_epsilon
        before, after, _ = self.blocks
        x = F.embedding(input_ids, self.wte) + F.embedding(position_ids, self.wpe)
        for i, layer in enumerate(self.layers):
            q, k, v = before(x, layer, heads, eps)
            x = after(x, attend(i, q, k, v, self.scale), layer, eps)
        return F.layer_norm(x, x.shape[-1:], self.ln_f_weight, self.ln_f_bias, eps)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., n_embd), in the weights' precision under autocast too.

        In bf16, logits of GPT-2's size move in steps of 1/2, each time to another side: a token's log-prob would
        differ by what it was batched with.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.to(self.wte.dtype), self.wte)
