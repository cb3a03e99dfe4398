"""Checkpoints that are whole or not there: staged, synced, hashed, renamed; and what may be trusted of those on disk.

A checkpoint is a folder `<kind>-<step>` of the run's output folder with a manifest of its files' sizes and SHA-256.
It is written under another name on the same filesystem; the manifest comes last, then one rename makes it visible.
A process killed at any point leaves either the checkpoint or a `.staging-` folder that nobody reads.

    kind        written                                      kept
    checkpoint  every `save_steps`, and at a stop            the newest `save_total_limit`
    stable      a copy, once the steps after it were healthy the newest two
    recovery    before a rollback                            the newest three
    debug       a state that failed a check                  the newest three

Only the first two are ever resumed from without being named. The hashes detect damage, not tampering.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import WEIGHTS_NAME, logging

from rookworld_trl.checkpointing.stopping import DiskError
from rookworld_trl.modeling.hub import PUSHING

logger = logging.get_logger(__name__)

Kind = Literal["checkpoint", "stable", "recovery", "debug"]
RESUMABLE: tuple[Kind, ...] = ("checkpoint", "stable")

MANIFEST_FILE = "manifest.json"
REASON_FILE = "reason.txt"
# What must be there, by the beginning of a name: of one process or replicas; FSDP's; DeepSpeed's.
REQUIRED = {
    "trainer state": (TRAINER_STATE_NAME,),
    "schedule": (SCHEDULER_NAME,),
    "optimizer state": (OPTIMIZER_NAME, "optimizer_", "optimizer.bin", "global_step"),
    "weights": ("model", "adapter_model", "pytorch_model_fsdp", "global_step"),
}
MODEL_FOLDER = "checkpoint"  # in the output folder: the trained model
MODEL_FILES = ("model", "config.json", "tokenizer")  # how their names begin
STABLE_LIMIT, SPECIAL_LIMIT = 2, 3
STAGING, REPLACED, DELETING = ".staging-", ".replaced-", ".deleting-"

# What loading would pick up if it lay in the folder, whoever put it there.
_LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class CheckpointError(DiskError):
    """A checkpoint that could not be written, or not be made stable."""


def _sync(path: Path) -> None:
    """Have the operating system put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)


def commit(staged: Path, final: Path) -> None:
    """Make the complete folder `staged` visible as `final`, on the same filesystem, replacing what is there.

    Raises:
        OSError: disk full, no permission; `final` is then as it was.
    """
    files = _files(staged)
    with (staged / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": described(staged, files)}, file, indent=1)
    for path in (*files, staged / MANIFEST_FILE, *(each for each in staged.rglob("*") if each.is_dir()), staged):
        _sync(path)
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():  # no call swaps two folders; `sweep` puts the old one back if the run ends in between
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def described(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def damage(folder: Path, described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which of the files are missing or not as `described` says.

    Raises:
        KeyError, TypeError, AttributeError: it is no such description.
    """
    problems = []
    for name, entry in described.items():
        file, size = folder / name, entry["bytes"]
        if not file.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name} lies outside of the checkpoint")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {size}")
        elif _sha256(file) != entry["sha256"]:
            problems.append(f"{name} is damaged: its SHA-256 is not the one that was written down")
    return problems


def verify(folder: Path, finite: bool = False) -> list[str]:
    """What is wrong with a checkpoint: damaged, missing and foreign files; empty if it may be resumed from.

    Args:
        finite: also read the weights and look for NaN and Inf.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return [f"{MANIFEST_FILE} is missing: the checkpoint was not written to its end, or by another trainer"]
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        damaged = damage(folder, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_FILE} is damaged ({error!r})"]
    problems = [
        f"there is no {part} ({' or '.join(beginnings)})"
        for part, beginnings in REQUIRED.items()
        if not any(name.startswith(beginnings) for name in files)
    ]
    problems += [f"{name} is a pickle of weights" for name in files if name == WEIGHTS_NAME]
    problems += damaged
    present = (path.relative_to(folder).as_posix() for path in _files(folder))
    problems += [
        f"{name} is not in {MANIFEST_FILE}" for name in present if name not in files and name.endswith(_LOADED_SUFFIXES)
    ]
    return problems or (_not_finite(folder, files) if finite else [])


def _not_finite(folder: Path, names: Iterable[str]) -> list[str]:
    problems = []
    for name in names:
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


def list_checkpoints(output_dir: Path, kinds: Iterable[Kind] = RESUMABLE) -> list[Path]:
    """Folders of these kinds, whole or not, newest step first; at equal steps in the order of `kinds`.

    Steps decide, not the files' times: clocks jump.
    """
    order = {kind: number for number, kind in enumerate(kinds)}
    found = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        match = re.fullmatch(r"([a-z]+)-(\d+)", folder.name)
        if match and match.group(1) in order and folder.is_dir():
            found.append((-int(match.group(2)), order[match.group(1)], folder))  # type: ignore[index]
    return [folder for *_, folder in sorted(found)]


def newest_valid(output_dir: Path, kinds: Iterable[Kind] = RESUMABLE) -> Path | None:
    """The newest checkpoint that verifies and whose weights are finite; None if there is none. Changes nothing."""
    return next((folder for folder in list_checkpoints(output_dir, kinds) if not verify(folder, finite=True)), None)


def set_aside(folder: Path, reason: str, prefix: str = "quarantined") -> Path:
    """Rename a checkpoint so that nothing resumes from it or deletes it, put the reason inside, and say so.

    Returns:
        The new path, `<prefix>-<old name>`, with a number behind it if that is taken.
    """
    taken = 1
    target = folder.with_name(f"{prefix}-{folder.name}")
    while target.exists():
        taken += 1
        target = folder.with_name(f"{prefix}-{folder.name}-{taken}")
    os.rename(folder, target)
    (target / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
    logger.warning(f"{folder} is now {target.name}: {reason}. Delete it if you do not need it.")
    return target


def sweep(output_dir: Path) -> None:
    """Clear up what a killed process left: unfinished folders go, a checkpoint about to be replaced comes back.

    Only for the process that is going to write here: it would take away the staging folder of a run in progress.
    """
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if folder.name.startswith((STAGING, DELETING, PUSHING)):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name.startswith(REPLACED):
            original = folder.with_name(folder.name.removeprefix(REPLACED))
            if original.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                os.rename(folder, original)


def promote(checkpoint: Path, limit: int) -> Path:
    """Copy a regular checkpoint to a stable one beside it, bytes read back and verified; older ones beyond `limit` go.

    A copy, not a link: damage to one must not reach the other.

    Raises:
        CheckpointError: the checkpoint does not verify.
        OSError: disk full, no permission.
    """
    final = checkpoint.with_name(f"stable-{step_of(checkpoint)}")
    staged = checkpoint.with_name(STAGING + final.name)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, staged)
        problems = verify(staged, finite=True)
        if problems:
            raise CheckpointError(f"{checkpoint} is not made stable: {'; '.join(problems)}")
        commit(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    prune(checkpoint.parent, "stable", max(1, limit))
    return final


@dataclass
class StableCheckpoints:
    """Which regular checkpoints become stable: those that enough healthy steps have followed.

    Attributes:
        after: how many steps; 0: none ever becomes stable.
        candidates: regular checkpoints, oldest first, that may yet become stable.
    """

    after: int
    candidates: list[Path] = field(default_factory=list)

    def step_done(self, step: int, last_fault: int, write: bool) -> None:
        """Make the newest proven candidate stable; one that a fault has followed proves nothing any more.

        Args:
            last_fault: the step that a fault was found in last.
            write: this is the process that writes.
        """
        self.candidates = [each for each in self.candidates if self.after and step_of(each) >= last_fault]
        proven = [each for each in self.candidates if step - step_of(each) >= self.after]
        if not proven:
            return
        self.candidates = self.candidates[len(proven) :]
        if write:
            try:
                promote(proven[-1], STABLE_LIMIT)
            except (CheckpointError, OSError) as error:
                logger.error(f"{proven[-1]} is not made stable: {error}")


def prune(output_dir: Path, kind: Kind, limit: int | None, keep: Iterable[Path] = ()) -> None:
    """Delete the oldest checkpoints of a kind beyond `limit` (None or 0: no limit), but none of `keep`.

    A folder loses its name before its files, so that no half-deleted checkpoint is ever seen.
    """
    if not limit:
        return
    kept = {path.resolve() for path in keep}
    for folder in list_checkpoints(output_dir, (kind,))[limit:]:
        if folder.resolve() not in kept:
            doomed = folder.with_name(DELETING + folder.name)
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
