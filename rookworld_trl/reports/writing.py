"""What a run leaves behind for people: its summary, the model's card and the report, made one after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rookworld_trl.reports.card import trained_on, write_card
from rookworld_trl.reports.run import HTML
from rookworld_trl.reports.summary import write_summary

SHOWN = ["seed", "learning_rate", "beta", "temperature", "num_generations", "generation_batch_size", "num_iterations"]
SHOWN += ["metric_for_best_model", "objective"]


def write_report(folders: Sequence[Path], boards: Any) -> Path:
    """The report; Bokeh, which takes seconds to import, is imported when there is one to write."""
    from rookworld_trl.reports import document

    return document.write_report(folders, boards=boards)


def write_for_people(
    folder: Path,
    step: Callable[[str], AbstractContextManager[None]],
    args: Any,
    boards: Any = None,
    *,
    metrics: Sequence[Mapping[str, Any]],
    **facts: Any,
) -> None:
    """Write `summary.json`, the card of `checkpoint/` and `report.html`; see `write_summary` for the arguments.

    Args:
        args: the trainer's, of which `SHOWN` goes into the summary, and with it `trained_on`, the reward that was.
        boards: draws the report's items, as `document.Boards`.
        metrics: its `comparison`.
        step: what each of them is written under, by its name, such as `LastSteps.step`: one that fails is then
            reported by itself, and the others are still written.
    """
    facts |= {name: getattr(args, name) for name in SHOWN}
    facts |= {"model_commit": facts.get("identity", {}).get("model_commit"), "trained_on": trained_on(facts)}
    with step("summary.json"):
        write_summary(folder, comparison=metrics, **facts)
    with step("model card"):
        write_card(folder, folder / "checkpoint")
    with step(HTML):
        write_report([folder], boards)
