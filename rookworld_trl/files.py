"""Small files that a killed process or a full disk leaves whole."""

import os
from pathlib import Path


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
