"""What is hung into a model: forward hooks, on models with adapters or compiled too, and position ids that follow the
attention mask, so that left padding does not move learned positions.

`generate()` derives `position_ids` from the attention mask; a plain forward pass that is given only the mask does not:
GPT-2 then counts from the first column, padding included, and every row shorter than the longest of its batch is
scored at shifted positions. Nothing fails; log-probabilities, KL and gradients are merely wrong.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook for the length of the block.

    What `torch.compile` has compiled does not look whether hooks were added since, so the model runs as it is written
    inside the block.
    """
    handle = module.register_forward_hook(hook)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


def without_adapters(model: Any) -> Any:
    """The model below peft's adapters; itself where there are none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def capture_hidden(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the last hidden states (B, S, H) of each forward pass of the backbone inside the block."""
    states: list[torch.Tensor] = []
    with hooked(without_adapters(model).base_model, lambda _, __, output: states.append(output.last_hidden_state)):
        yield states


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other values of an object's attributes for the length of the block."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def positions_from_mask(attention_mask: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Number the attended tokens of each row from 0; padding gets position 0, which nothing attends to.

    Args:
        attention_mask: (B, S), 1 for tokens and 0 for padding, on either side.
        length: return only the last `length` columns (the new tokens, when a cache holds the others).

    Returns:
        (B, length or S), int64.
    """
    positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp_(min=0)
    positions = positions.masked_fill(attention_mask == 0, 0)
    return positions if length is None else positions[:, -length:]


def install_position_hook(model: nn.Module) -> RemovableHandle:
    """Make the backbone of `model` fill `position_ids` from a 2-D `attention_mask` whenever the caller gave none.

    The hook sits on the backbone (`model.base_model`, for GPT-2 `model.transformer`), so that it also serves callers
    that bypass `model.forward`. A PEFT model is unwrapped first. Installing it twice is harmless: the second hook
    finds the positions already set.

    Returns:
        A handle whose `remove()` takes the hook off again.

    Raises:
        ValueError: the backbone takes no `position_ids`, so its positions cannot be set from outside.
    """
    inner = without_adapters(model)
    backbone = getattr(inner, "base_model", inner)
    signature = inspect.signature(type(backbone).forward)
    if "position_ids" not in signature.parameters:
        raise ValueError(
            f"{type(backbone).__name__}.forward takes no `position_ids`, so left-padded batches cannot be scored "
            "correctly; use a model that takes them (GPT-2 and most decoder-only models do)"
        )

    def fill(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = signature.bind_partial(module, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        if given.get("position_ids") is not None or mask is None or mask.ndim != 2:
            return args, kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        kwargs["position_ids"] = positions_from_mask(mask, None if tokens is None else tokens.shape[1])
        return args, kwargs

    return backbone.register_forward_pre_hook(fill, with_kwargs=True)
