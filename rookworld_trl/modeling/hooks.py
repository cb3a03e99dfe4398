"""Forward hooks that come and go, on models that may be compiled."""

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
