"""What holds for the length of a block: forward hooks, on models with adapters or compiled, and attributes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
