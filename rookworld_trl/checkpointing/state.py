"""The trainer's own state inside a checkpoint: JSON for values, safetensors for tensors, nothing that is unpickled."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils import get_total_norm

STATE_FILE = "rookworld_state"  # .json, .safetensors: every control
REFERENCE_FILE = "reference.safetensors"

_TENSOR = "__tensor__"
_REMEDY = "resume from a checkpoint that this trainer wrote with the same controls switched on"


class Stateful(Protocol):
    """A control that carries something from step to step, as nested dicts and lists of JSON values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Remembers:
    """A control whose state is some of its attributes: JSON values, lists and dicts of them, or tensors."""

    REMEMBERED: ClassVar[tuple[str, ...]]  # their names

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({name: getattr(self, name) for name in self.REMEMBERED})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.REMEMBERED:
            setattr(self, name, copy.deepcopy(state[name]))


def save_state(folder: Path, controls: Mapping[str, Stateful], reference: nn.Module | None) -> None:
    """Write the state of every control, and `reference` if one is given, into a checkpoint's folder."""
    save_tree(folder, STATE_FILE, {name: control.state_dict() for name, control in controls.items()})
    if reference is not None:
        save_model(reference, str(folder / REFERENCE_FILE))


def load_state(
    folder: Path, controls: Mapping[str, Stateful], reference: nn.Module | None, device: torch.device | str = "cpu"
) -> bool:
    """Restore what `save_state` wrote; the reference stays as it is if the checkpoint has none of its own.

    Returns:
        Whether it had one, that is, whether the reference was ever replaced.

    Raises:
        ValueError: the file is missing, unreadable, or lacks a control that this run uses.
    """
    states = load_tree(folder, STATE_FILE, device)
    for name, control in controls.items():
        try:
            control.load_state_dict(states[name])
        except KeyError as missing:
            raise ValueError(f"{folder / STATE_FILE}.json: field {missing} is missing; {_REMEDY}") from missing
    if reference is None or not (folder / REFERENCE_FILE).exists():
        return False
    load_model(reference, str(folder / REFERENCE_FILE))
    return True


def save_tree(folder: Path, name: str, tree: Any, other: Callable[[Any], Any] | None = None) -> None:
    """Write nested dicts and lists of JSON values and tensors as `<name>.json` and `<name>.safetensors`.

    Keys become strings and tuples lists. Floats come back bit by bit, NaN and Inf too.

    Args:
        other: turns any other value into one of these, `str` for instance.

    Raises:
        TypeError: another value, and no `other`.
    """
    tensors: dict[str, torch.Tensor] = {}

    def replace(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach().cpu().contiguous().clone()  # safetensors takes no views of one storage
            return {_TENSOR: key}
        if isinstance(value, Mapping):
            return {str(key): replace(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [replace(each) for each in value]
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if other is not None:
            return replace(other(value))
        raise TypeError(f"{folder / name}: a {type(value).__name__} has no place in a checkpoint's state")

    text = json.dumps(replace(tree), indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, str(folder / f"{name}.safetensors"))


def load_tree(folder: Path, name: str, device: torch.device | str = "cpu") -> Any:
    """What `save_tree` wrote, tensors on `device`.

    Raises:
        ValueError: a file is missing or unreadable.
    """
    path = folder / f"{name}.safetensors"
    try:
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(str(path)) if path.exists() else {}  # it knows no "cpu:0", as gloo's processes are called
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder / name}: cannot be read ({error}); {_REMEDY}") from error

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {_TENSOR}:
                return tensors[value[_TENSOR]].to(device)
            return {key: restore(each) for key, each in value.items()}
        return [restore(each) for each in value] if isinstance(value, list) else value

    return restore(tree)


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element of any tensor is NaN or Inf; one synchronisation with the device."""
    # The largest absolute value: unlike a sum, it cannot overflow by itself.
    norm = get_total_norm([t.detach() for t in tensors if t.is_floating_point() and t.numel()], norm_type=math.inf)
    return bool(norm.isfinite())


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
