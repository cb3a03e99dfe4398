"""Functions of tests in processes of their own: one alone, or several as torchrun starts them."""

import faulthandler
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
STUCK = 420.0  # seconds; the longest takes a tenth of that
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(function: Callable[..., None], *arguments: Any) -> list[str]:
    """The words behind `python` that call a module's function with JSON values (paths become strings)."""
    words = [function.__module__, function.__name__, json.dumps(arguments, default=str)]
    return ["-m", "tests.support.processes", *words]


def call(function: Callable[..., None], *arguments: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the function in one or two processes and wait for them; its return code is the caller's to look at. Where
    they wait for each other without end, each ends by itself, and what all its threads were doing is on stderr."""
    words = [sys.executable, *(TWO if processes == 2 else []), *command(function, *arguments)]
    return subprocess.run(
        words, env={**os.environ, **ALONE}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=STUCK + 180
    )


def called(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """`call`, which must succeed without a warning of the pinned versions, about nothing that a user could change."""
    done = call(function, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FutureWarning" not in done.stderr


HOLDER = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.pwrite(file, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
print("locked", flush=True)
time.sleep(600)
"""


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder's lock."""
    command = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def leave() -> None:
    """Close the group and see that no thread of it is left: one that outlives the interpreter aborts the process."""
    from rookworld_trl.ranks import close_process_group

    close_process_group()
    names = [task.read_text(encoding="utf-8").strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert "pt_gloo_runloop" not in names, names


if __name__ == "__main__":
    faulthandler.dump_traceback_later(STUCK, exit=True)  # the end of the interpreter included
    module, name, arguments = sys.argv[1:]
    getattr(importlib.import_module(module), name)(*json.loads(arguments))
    leave()
