"""Small files that a killed process or a full disk leaves whole, and what is said where a disk is full."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content so that a reader, or the next process, finds the old or the new one, never a part.

    Raises:
        OSError: disk full, no permission; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    try:
        with staged.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line; a part of one that a killed process left behind is ended first.

    Raises:
        OSError: disk full, no permission; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:  # unbuffered: closing writes nothing more
        size = file.seek(0, os.SEEK_END)
        torn = False
        if size:
            file.seek(size - 1)
            torn = file.read(1) != b"\n"
        data = b"\n" * torn + line.encode() + b"\n"
        try:
            if file.write(data) != len(data):
                raise OSError(f"{path}: only a part of the line could be written")
        except OSError:
            file.truncate(size)
            raise


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a log, objects with a number `step`, and which of its lines (from 1) are none; none without a file.

    The last line may be torn, of a run that was killed or goes on: it is passed over.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            whole = type(row["step"]) in (int, float) and math.isfinite(row["step"])
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            rows.append(row)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    return rows, damaged


class DiskError(RuntimeError):
    """Something that a run needs on a disk cannot be written; the message names place and remedy."""

    exit_code = 4  # unrecoverable, as `rookworld_trl.checkpointing.stopping` has it


@contextmanager
def needs_disk(what: str | Path, remedy: str = "Make room there") -> Iterator[None]:
    """Raises:
    DiskError: the block met a full disk, or may not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{what} could not be written: {error}. {remedy}") from error


def check_output_dir(output_dir: str | Path) -> None:
    """Make the run's folder and write to it once, before anything that takes time.

    Raises:
        ValueError: it cannot be written.
    """
    folder = Path(output_dir)
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}: nothing can be written there ({error}). Choose a folder on a disk "
            "with room that you may write to"
        ) from error
