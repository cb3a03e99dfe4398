"""States known to be good, kept in memory: what a run goes back to when a step has spoiled its weights.

The idea is PaLM's (arXiv 2204.02311, section 5.1: go back to before the loss spike and skip its batches), without the
disk: data, random numbers and the step counter go on, so that the same batch isn't met again.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element of any tensor is NaN or Inf; one synchronisation with the device."""
    # The largest absolute value: unlike a sum, it cannot overflow by itself.
    norm = get_total_norm([t.detach() for t in tensors if t.is_floating_point() and t.numel()], norm_type=math.inf)
    return bool(norm.isfinite())


def numbers_finite(state: Any) -> bool:
    """Whether nested dicts and lists of JSON values hold neither NaN nor Inf."""
    if isinstance(state, dict | list | tuple):
        return all(map(numbers_finite, state.values() if isinstance(state, dict) else state))
    return not isinstance(state, float) or math.isfinite(state)


def copy_tree(tree: Any, into: Any = None) -> Any:
    """A copy of nested dicts, lists and tuples with their tensors on the CPU, in the tensors of `into` where they fit.

    Args:
        into: an earlier copy that is no longer needed.
    """
    if isinstance(tree, torch.Tensor):
        fits = isinstance(into, torch.Tensor) and into.shape == tree.shape and into.dtype == tree.dtype
        kept = into if fits else torch.empty_like(tree, device="cpu", requires_grad=False)
        return kept.copy_(tree.detach())
    if isinstance(tree, Mapping):
        old = into if isinstance(into, Mapping) else {}
        return {key: copy_tree(value, old.get(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        old_items = list(into) if isinstance(into, list | tuple) and len(into) == len(tree) else [None] * len(tree)
        return type(tree)(copy_tree(value, old) for value, old in zip(tree, old_items, strict=True))
    return copy.deepcopy(tree)


class Snapshots:
    """The last good state, and a newer one that has yet to prove itself; their memory is allocated once.

    A state counts as good only when a whole step has gone well with it: weights that make the next loss NaN may look
    healthy by themselves.

    Attributes:
        good: the state to go back to; None before the first one.
        step: the optimizer step after which it was taken.
    """

    def __init__(self) -> None:
        self.good: Any = None
        self.step = 0
        self._candidate: tuple[Any, int] | None = None
        self._spare: Any = None

    def take(self, state: Any, step: int) -> None:
        """Copy `state` (nested containers of tensors and values) as a candidate, in place of an earlier one."""
        spare = self._spare if self._candidate is None else self._candidate[0]
        self._candidate, self._spare = (copy_tree(state, spare), step), None

    def promote(self) -> None:
        """The candidate, if there is one, is good."""
        if self._candidate is not None:
            self._spare = self.good
            self.good, self.step = self._candidate
            self._candidate = None

    def drop(self) -> None:
        """Forget the candidate."""
        if self._candidate is not None:
            self._spare, self._candidate = self._candidate[0], None


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` that leaves `state` alone and the learning rates in force."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(copy_tree(state))  # it keeps tensors that are on the right device, so it gets its own
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def load_tensors(target: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy `saved` into the tensors of the same names, in place."""
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(saved[name])


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes in a model: parameters with gradients, and floating-point buffers."""
    tensors = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return tensors | {name: each for name, each in model.named_buffers() if each.is_floating_point()}
