"""One run at a time in an output folder.

Two would delete and rename each other's checkpoints. The lock is the kernel's, on a file in the folder: it goes with
the process that holds it, however that process ends, so that nothing has to be cleared up after a kill.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing.exits import BAD_INPUT

logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"
_held: dict[Path, int] = {}  # this process's locks: open file by folder


class FolderInUseError(ValueError):
    """Another run is at work in the folder; the message names its process and host."""

    exit_code = BAD_INPUT


@contextmanager
def locked(output_dir: str | Path, main: bool = True) -> Iterator[None]:
    """Keep other runs out of the folder inside the block; every process of a run must call this.

    A process that holds the lock already may take it again.

    Args:
        main: whether this process is the one that takes it.

    Raises:
        FolderInUseError: another run holds it.
        ValueError: nothing can be written there.
    """
    folder = Path(output_dir).resolve()
    ours = ranks.decided(main, lambda: folder not in _held and _take(folder))
    try:
        yield
    finally:
        if main and ours:
            _release(folder)


def reclaim(output_dir: str | Path) -> None:
    """Where the locked folder has been deleted under the run, say so, make it again and go on there.

    Raises:
        FolderInUseError: another run is at work there by now.
    """
    folder = Path(output_dir).resolve()
    if folder not in _held or _still_there(_held[folder], folder):
        return
    lost = _held[folder]
    _take(folder)
    os.close(lost)
    logger.error(
        f"{folder} was deleted while this run was at work in it, or at least its {LOCK_FILE}: checkpoints, logs and "
        "evaluations that are missing now are lost. The run goes on in the folder, made again"
    )


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


def _take(folder: Path) -> bool:
    check_output_dir(folder)
    while True:
        file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "it does not say which"
            os.close(file)
            raise FolderInUseError(
                f"`output_dir` is {str(folder)!r}: another run is at work there ({holder}). Wait for it, stop it, or "
                "choose another folder"
            ) from error
        except OSError as error:
            logger.warning(f"{folder}: its file system has no locks ({error}); start no second run there")
        if _still_there(file, folder):
            break
        os.close(file)  # its run has just ended and taken the file along
    os.ftruncate(file, 0)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)
    _held[folder] = file
    return True


def _release(folder: Path) -> None:
    file = _held.pop(folder, None)
    if file is not None:  # not in a forked child
        if _still_there(file, folder):
            (folder / LOCK_FILE).unlink()
        os.close(file)


def _still_there(file: int, folder: Path) -> bool:
    """Whether the open lock file is the one that others find in the folder."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(folder / LOCK_FILE))
    except OSError:
        return False


def _forget() -> None:
    """In a forked child: a data loader's worker that outlives the run must not keep its lock."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
