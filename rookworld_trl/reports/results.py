"""What a run leaves behind for people: its summary, the model's card and the plot, made one after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rookworld_trl.reports.card import write_card
from rookworld_trl.reports.plots import plot_run
from rookworld_trl.reports.run import read_run
from rookworld_trl.reports.summary import write_summary


def write_results(
    folder: Path,
    step: Callable[[str], AbstractContextManager[None]],
    seconds: Mapping[str, float],
    *,
    metrics: Sequence[Mapping[str, Any]],
    **facts: Any,
) -> None:
    """Write `summary.json`, the card of `checkpoint/` and `plot.png`; see `write_summary` for the arguments.

    Args:
        metrics: its `comparison`.
        step: what each of them is written under, by its name, such as `LastSteps.step`: one that fails is then
            reported by itself, and the others are still written.
    """
    facts["model_commit"] = facts.get("identity", {}).get("model_commit")
    with step("summary.json"):
        write_summary(folder, comparison=metrics, seconds=seconds, **facts)
    with step("model card"):
        write_card(folder, folder / "checkpoint")
    with step("plot.png"):
        plot_run(read_run(folder), folder / "plot.png")
