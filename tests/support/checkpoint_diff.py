"""Two checkpoints compared value by value, tolerance zero: the test of an exact resume.

python -m tests.support.checkpoint_diff runs/a/checkpoint-100 runs/b/checkpoint-100
"""

import json
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from rookworld_trl.checkpointing.store import MANIFEST_FILE

# Measurements of time and memory, by key: no two runs agree on them.
WALL_CLOCK = ("step_time", "*seconds_per_sample", "perf/*", "*runtime", "*_per_second", "started", "seconds", "warm")
# Measured on the first batch after each start.
EACH_START = ("gates/*",)
# Where a run lives and how often it saves; what it computes doesn't depend on them.
PLACES = ("output_dir", "best_model_checkpoint", "save_steps", "save_total_limit", "resume_from_checkpoint")

IGNORED = WALL_CLOCK + EACH_START + PLACES


def differences(a: Path, b: Path, ignore: tuple[str, ...] = IGNORED) -> list[str]:
    """Every place in which two checkpoints differ: files, keys, types, shapes, bits; empty if they are equal.

    Args:
        ignore: patterns of keys whose values are not compared.
    """
    names_a, names_b = _names(a), _names(b)
    found = [f"{name}: only in one" for name in sorted(names_a ^ names_b)]
    for name in sorted(names_a & names_b):
        found += [f"{name}{place}" for place in compare(_read(a / name), _read(b / name), "", ignore)]
    return found


def _names(folder: Path) -> set[str]:
    # The manifest holds hashes of files that hold times.
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names - {MANIFEST_FILE}


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".safetensors":
        return load_file(str(path))
    if path.suffix in (".pt", ".pth"):
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    return path.read_bytes()


def compare(a: Any, b: Any, place: str, ignore: tuple[str, ...]) -> Iterator[str]:
    if type(a) is not type(b):
        yield f"{place}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, Mapping):
        for key in sorted(a.keys() | b.keys(), key=str):
            if any(fnmatchcase(str(key), pattern) for pattern in ignore):
                continue
            if key in a and key in b:
                yield from compare(a[key], b[key], f"{place}[{key!r}]", ignore)
            else:
                yield f"{place}[{key!r}]: only in one"
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{place}: {len(a)} and {len(b)} items"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from compare(x, y, f"{place}[{index}]", ignore)
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            yield f"{place}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(_bits(a), _bits(b)):
            yield f"{place}: {int((_bits(a) != _bits(b)).sum())} of {_bits(a).numel()} bytes differ"
    elif isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            yield f"{place}: arrays differ"
    elif a != b and not (a != a and b != b):  # NaN equals NaN
        shown = (a, b) if not isinstance(a, bytes) else (len(a), len(b))
        yield f"{place}: {shown[0]!r} and {shown[1]!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


if __name__ == "__main__":
    lines = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(lines) or "equal")
    sys.exit(bool(lines))
