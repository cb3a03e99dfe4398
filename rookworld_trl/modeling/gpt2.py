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

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    # The tanh approximation under its three names in the wild; RookWorld-LM and OpenAI's GPT-2 say `gelu_new`.
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# How queries meet keys is the one thing that differs between prefill, decoding and scoring:
# (layer, q, k, v, scale) -> output, with q, k, v and the output of shape (batch, length, heads, head_dim).
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class Layer(NamedTuple):
    """The tensors of one block, in the order of `LAYER_SHAPES`."""

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


def check_config(config: Any) -> None:
    """Refuse every GPT-2 variant that this module does not compute.

    Raises:
        ValueError: naming the field of the config, its value and what is supported.
    """
    if config.model_type != "gpt2":
        raise ValueError(f"model_type is {config.model_type!r}: only 'gpt2' is supported")
    if config.activation_function not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation_function is {config.activation_function!r}: use one of {known}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    for field, wanted in (
        ("add_cross_attention", False),
        ("reorder_and_upcast_attn", False),
        ("tie_word_embeddings", True),
    ):
        if getattr(config, field) != wanted:
            raise ValueError(f"{field} is {getattr(config, field)}: only {wanted} is supported")


def weight_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a GPT-2, in the checkpoints' order, without the `transformer.` prefix."""
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    layer: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }
    return {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        **{f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()},
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }


def canonical_weights(config: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under their canonical names, in canonical order; strict about names and shapes.

    Takes checkpoints with and without the `transformer.` prefix, the tied `lm_head.weight`, and the causal-mask
    buffers (`attn.bias`, `attn.masked_bias`) that old exports carry.

    Raises:
        ValueError: a weight is missing, unknown or of another shape, or the head is not the token embedding.
    """
    found = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    found = {name: tensor for name, tensor in found.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = found.pop("lm_head.weight", None)
    expected = weight_shapes(config)
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the weights are not those of the config: missing {_first(missing)}; unknown {_first(unknown)}. "
            "Load the checkpoint that belongs to this config.json, unsharded and without adapters"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(found[name].shape)}, the config says {shape}")
    if head is not None and head is not found["wte.weight"] and not torch.equal(head, found["wte.weight"]):
        raise ValueError("lm_head.weight differs from wte.weight: untied heads are not supported")
    return {name: found[name] for name in expected}


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "none"


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def before_attention(x: Tensor, layer: Layer, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., heads, head_dim) of a block's input (..., n_embd)."""
    width = x.shape[-1]
    normed = F.layer_norm(x, (width,), layer.ln_1_weight, layer.ln_1_bias, eps)
    q, k, v = _affine(normed, layer.attn_weight, layer.attn_bias).unflatten(-1, (3, heads, width // heads)).unbind(-3)
    return q, k, v


def after_attention(
    x: Tensor, mixed: Tensor, layer: Layer, activation: Callable[[Tensor], Tensor], eps: float
) -> Tensor:
    """A block's output (..., n_embd) from its input and what attention made of it, (..., heads, head_dim)."""
    x = x + _affine(mixed.flatten(-2), layer.attn_proj_weight, layer.attn_proj_bias)
    normed = F.layer_norm(x, x.shape[-1:], layer.ln_2_weight, layer.ln_2_bias, eps)
    return x + _affine(
        activation(_affine(normed, layer.fc_weight, layer.fc_bias)), layer.fc_proj_weight, layer.fc_proj_bias
    )


class Blocks(NamedTuple):
    """What computes a block around its attention, token by token; see `compile_blocks` for the compiled ones.

    Attributes:
        padded: how many tokens a pass over so many is padded to, so that shapes come again.
    """

    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
    after: Callable[..., Tensor] = after_attention
    padded: Callable[[int], int] = int


EAGER = Blocks()

# To how many tokens compiled passes are padded, so that few numbers occur and few graphs are made.
MULTIPLE = 64  # tokens: what tensor cores like, where one graph does for all lengths
SMALLEST = 512  # tokens, where each length has a graph of its own: rows scored alone all fall into this one


def compile_blocks(options: Mapping[str, Any]) -> Blocks:
    """Blocks by `torch.compile`, for passes whose number of tokens differs from batch to batch.

    Attention stays as it is: its kernels are fused already, and its tiles have too many shapes. What is left of a block
    works token by token, so all layers of a pass share one graph, and only the number of tokens can make another. A
    code object has at most `torch._dynamo.config.recompile_limit` graphs, and runs as it is written for whatever comes
    after.

    Args:
        options: its arguments; the graphs are for one number of tokens each where `dynamic` is False.
    """
    before, after = torch.compile(before_attention, **options), torch.compile(after_attention, **options)
    return Blocks(before, after, bucket if options.get("dynamic") is False else next_multiple)


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    from torch._dynamo.utils import counters  # imported where something is compiled

    return counters["stats"]["unique_graphs"]


def next_multiple(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def bucket(tokens: int) -> int:
    """The next of four sizes an octave, 512 at least: 512, 640, 768, 896, 1024, 1280, ...; at most a quarter more."""
    tokens = max(tokens, SMALLEST)
    step = 1 << (tokens - 1).bit_length() >> 3
    return -(-tokens // step) * step


class GPT2:
    """GPT-2's forward pass over a mapping of weights, which are used in place and never copied.

    Args:
        config: a transformers `GPT2Config` or anything with its fields.
        weights: state dict or named parameters; see `canonical_weights` for what is accepted.
        blocks: what computes them.

    Raises:
        ValueError: the config is of an unsupported variant, or the weights do not fit it.
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor], blocks: Blocks = EAGER) -> None:
        check_config(config)
        self.config, self.blocks = config, blocks
        tensors = list(canonical_weights(config, weights).values())
        self.wte, self.wpe, self.ln_f_weight, self.ln_f_bias = tensors[0], tensors[1], tensors[-2], tensors[-1]
        size = len(Layer._fields)
        self.layers = [Layer(*tensors[2 + i * size : 2 + (i + 1) * size]) for i in range(config.n_layer)]
        self.head_dim = config.n_embd // config.n_head
        scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        by_layer = config.scale_attn_by_inverse_layer_idx
        self.scales = [scale / (i + 1) if by_layer else scale for i in range(config.n_layer)]
        self._activation = ACTIVATIONS[config.activation_function]

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
            x = after(x, attend(i, q, k, v, self.scales[i]), layer, self._activation, eps)
        return F.layer_norm(x, x.shape[-1:], self.ln_f_weight, self.ln_f_bias, eps)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., n_embd), in the weights' precision under autocast too.

        In bf16, logits of GPT-2's size move in steps of 1/2, each time to another side: a token's log-prob would
        differ by what it was batched with.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.to(self.wte.dtype), self.wte)
