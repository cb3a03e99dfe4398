"""Checkpoints that are whole or not there: staged, synced, hashed, renamed; and what may be trusted of those on disk.

A checkpoint is a folder `checkpoint-<step>` of the run's output folder with a manifest of its files' sizes and SHA-256.
It is written under another name on the same filesystem; the manifest comes last, then one rename makes it visible.
A process killed at any point leaves either the checkpoint or a `.staging-` folder that nobody reads.
The hashes detect damage, not tampering.

The trainer's own state inside it is JSON for values and safetensors for tensors: nothing is unpickled.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import WEIGHTS_NAME

from rookworld_trl.files import DiskError

MANIFEST_FILE = "manifest.json"
# What must be there, by the beginning of a name: of one process or replicas; FSDP's; DeepSpeed's.
REQUIRED = {
    "trainer state": (TRAINER_STATE_NAME,),
    "schedule": (SCHEDULER_NAME,),
    "optimizer state": (OPTIMIZER_NAME, "optimizer_", "optimizer.bin", "global_step"),
    "weights": ("model", "adapter_model", "pytorch_model_fsdp", "global_step"),
}
MODEL_FOLDER = "checkpoint"  # in the output folder: the trained model
RESCUED_FOLDER = "checkpoint.rescued"  # the same, where that could not be written
STAGING, DELETING = ".staging-", ".deleting-"

# What loading would pick up if it lay in the folder, whoever put it there.
_LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

_TENSOR = "__tensor__"
REMEDY = "resume from a checkpoint that this trainer wrote with the same controls switched on"


class CheckpointError(DiskError):
    """A checkpoint that could not be written."""


def _sync(path: Path) -> None:
    """Have the operating system put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)


def commit(staged: Path, final: Path) -> None:
    """Make the complete folder `staged` visible as `final`, on the same filesystem, replacing what is there.

    Raises:
        OSError: disk full, no permission.
    """
    files = _files(staged)
    with (staged / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": described(staged, files)}, file, indent=1)
    for path in (*files, staged / MANIFEST_FILE, *(each for each in staged.rglob("*") if each.is_dir()), staged):
        _sync(path)
    if final.exists():  # no call swaps two folders
        remove(final)
    os.rename(staged, final)
    _sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a folder, which loses its name before its files, so that none is ever seen half-deleted."""
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def described(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files below a folder, by name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: damaged, missing and foreign files, weights with NaN or Inf; empty if it may be
    resumed from."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return [f"{MANIFEST_FILE} is missing: the checkpoint was not written to its end, or by another trainer"]
    found, problems = _files(folder), []
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        present = described(folder, found)
        for name, entry in files.items():
            if name not in present:
                problems.append(f"{name} is missing")
            elif present[name]["bytes"] != entry["bytes"]:
                problems.append(f"{name} has {present[name]['bytes']} bytes, not {entry['bytes']}")
            elif present[name] != entry:
                problems.append(f"{name} is damaged: its SHA-256 is not the one that was written down")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_FILE} is damaged ({error!r})"]
    for part, beginnings in REQUIRED.items():
        if not any(name.startswith(beginnings) for name in files):
            problems.append(f"there is no {part} ({' or '.join(beginnings)})")
    problems += [f"{name} is a pickle of weights" for name in files if name == WEIGHTS_NAME]
    problems += [
        f"{name} is not in {MANIFEST_FILE}" for name in present if name not in files and name.endswith(_LOADED_SUFFIXES)
    ]
    for name in files if not problems else ():
        if not (Path(name).name.startswith(("model", "adapter_model")) and name.endswith(".safetensors")):
            continue
        try:
            with safe_open(str(folder / name), framework="pt") as weights:
                broken = [key for key in weights.keys() if not torch.isfinite(weights.get_tensor(key)).all()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            problems.append(f"{name} cannot be read ({error})")
            continue
        if broken:
            problems.append(f"{name} holds NaN or Inf in {', '.join(broken[:3])}{', ...' if broken[3:] else ''}")
    return problems


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint's name.

    Raises:
        ValueError: the name has none.
    """
    match = re.fullmatch(r"[a-z]+-(\d+)", folder.name)
    if match is None:
        raise ValueError(f"{folder}: a checkpoint is called like checkpoint-100, with its step at the end")
    return int(match.group(1))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, newest step first: steps decide, not the files' times, for clocks jump."""
    folders = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    found = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_valid(output_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; None if there is none. Changes nothing."""
    return next((folder for folder in list_checkpoints(output_dir) if not verify(folder)), None)


def sweep(output_dir: Path) -> None:
    """Clear up what a killed process left unfinished.

    Only for the process that is going to write here: it would take away the staging folder of a run in progress.
    """
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if folder.name.startswith((STAGING, DELETING)):
            shutil.rmtree(folder, ignore_errors=True)


def prune(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: no limit), but not the best."""
    for folder in list_checkpoints(output_dir)[limit:] if limit else ():
        if best is None or folder.resolve() != Path(best).resolve():
            remove(folder)


# The trainer's own state


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


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write nested dicts and lists of JSON values and tensors as `<name>.json` and `<name>.safetensors`.

    Keys become strings and tuples lists. Floats come back bit by bit, NaN and Inf too.

    Raises:
        TypeError: another value.
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
        raise ValueError(f"{folder / name}: cannot be read ({error}); {REMEDY}") from error

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {_TENSOR}:
                return tensors[value[_TENSOR]].to(device)
            return {key: restore(each) for key, each in value.items()}
        return [restore(each) for each in value] if isinstance(value, list) else value

    return restore(tree)
