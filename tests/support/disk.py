"""A disk that is full, for one process and by the kernel's word."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def full_disk(*_: Any, **__: Any) -> NoReturn:
    """Stands in for whatever writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Let the kernel refuse to grow any file of this process beyond `size` bytes: a real, partial write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
