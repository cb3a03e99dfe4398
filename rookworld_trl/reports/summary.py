"""What a run leaves behind for people, made one after the other: `summary.json`, which needs nothing else to be
understood, the model's card and the report."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rookworld_trl
from rookworld_trl.files import write_atomically
from rookworld_trl.reports.card import trained_on, write_card
from rookworld_trl.reports.run import HTML, SUMMARY
from rookworld_trl.settings.parser import command

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "chess")
SHOWN = ["seed", "learning_rate", "beta", "temperature", "num_generations", "generation_batch_size", "num_iterations"]
SHOWN += ["metric_for_best_model", "objective"]


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of a block to `seconds[phase]`."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    own = {"python": platform.python_version(), "rookworld-trl": rookworld_trl.__version__}
    return own | {name: version(name) for name in PACKAGES}


def write_for_people(
    folder: Path,
    step: Callable[[str], AbstractContextManager[None]],
    args: Any,
    boards: Any = None,
    *,
    metrics: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    **facts: Any,
) -> None:
    """Write `summary.json`, the card of `checkpoint/` and `report.html`.

    Args:
        folder: the run's output folder.
        step: what each of them is written under, by its name, such as `LastSteps.step`: one that fails is then
            reported by itself, and the others are still written.
        args: the trainer's, of which `SHOWN` goes into the summary, and with it `trained_on`, the reward that was.
        boards: draws the report's items; see `document.write_report`.
        metrics: one row per task, mode and metric, with before, after, difference, interval and items; those marked
            `headline` stand first in the summary, under that name, and those marked `loss` behind them, as `losses`.
        seconds: wall time of each phase.
        facts: whatever else describes the run, JSON-ready (model, seed, steps, ...).
    """
    facts |= {name: getattr(args, name) for name in SHOWN}
    facts |= {"model_commit": facts.get("identity", {}).get("model_commit"), "trained_on": trained_on(facts)}
    summary = {
        "command": command(),
        **facts,
        "versions": versions(),
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "headline": [row for row in metrics if row["headline"]],
        "losses": [row for row in metrics if row["loss"]],
        "metrics": list(metrics),
    }
    with step(SUMMARY):
        write_atomically(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    with step("model card"):
        write_card(folder, folder / "checkpoint")
    with step(HTML):
        from rookworld_trl.reports import document  # Bokeh takes seconds to import

        document.write_report(folder, boards=boards)
