"""`summary.json`: what a run did, in one file that needs nothing else to be understood."""

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rookworld_trl
from rookworld_trl.files import write_atomically
from rookworld_trl.settings.parser import command

SUMMARY_FILE = "summary.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "chess")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of a block to `seconds[phase]`."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    own = {"python": platform.python_version(), "rookworld-trl": rookworld_trl.__version__}
    return own | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "unknown"


def write_summary(
    folder: Path,
    *,
    comparison: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    **facts: Any,
) -> Path:
    """Write `summary.json` and return its path.

    Args:
        folder: the run's output folder.
        comparison: one row per task, mode and metric, with before, after, difference, interval and items; those
            marked `headline` stand first, under that name, and those marked `loss` behind them, as `losses`.
        seconds: wall time of each phase.
        facts: whatever else describes the run, JSON-ready (model, seed, steps, ...).
    """
    rows = [dict(row) for row in comparison]
    summary = {
        "command": command(),
        **facts,
        "versions": versions(),
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "headline": [row for row in rows if row["headline"]],
        "losses": [row for row in rows if row["loss"]],
        "metrics": rows,
    }
    path = folder / SUMMARY_FILE
    write_atomically(path, json.dumps(summary, indent=1) + "\n")
    return path


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's `summary.json`."""
    return json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
