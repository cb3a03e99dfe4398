"""The report: one HTML file with everything inside, which opens without a network, of one run or of several."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rookworld_trl.files import write_atomically
from rookworld_trl.measuring.comparison import losses
from rookworld_trl.measuring.tables import as_text, changed, players_of
from rookworld_trl.reports.charts import PREFIX, forests, training_figures
from rookworld_trl.reports.run import GROUPED, HTML, Run, read_run

_NOT_FACTS = ("metrics", "headline", "losses", "groups", "seconds")

Cell = dict[str, Any]  # text, value to sort by, whether it is a loss or a gain


class Boards(Protocol):
    """What draws a run's held-out items, such as the module `rookworld_trl.chess.boards`."""

    @property
    def legend(self) -> Mapping[str, Any]:
        """Size and colours, by the names that the template knows."""

    def gallery(self, name: str, evaluations: Mapping[str, list[Mapping[str, Any]]]) -> Sequence[Any]:
        """Cards of a run's items, from its evaluations by name."""

    def shared_definitions(self) -> str:
        """SVG that the cards refer to, once a page."""


def write_report(folders: Sequence[Path | str], output: Path | str | None = None, boards: Boards | None = None) -> Path:
    """Write the report of one run, or of several side by side, and return its path.

    Args:
        folders: the runs' output folders.
        output: the file; None: `report.html` in the first folder.
        boards: draws the runs' held-out items; None leaves them out.

    Raises:
        RunError: a folder holds no readable run.
    """
    runs = named_apart([read_run(folder) for folder in folders], [str(folder) for folder in folders])
    path = Path(folders[0], HTML) if output is None else Path(output)
    write_atomically(path, render(runs, boards))
    return path


def named_apart(runs: Sequence[Run], folders: Sequence[str]) -> list[Run]:
    """The runs, those of one name called by their folders."""
    names = [run.name for run in runs]
    return [
        replace(run, name=folder) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def render(runs: Sequence[Run], boards: Boards | None = None) -> str:
    """The page."""
    figures = {"Change": forests(runs), **training_figures(runs)}
    flat = [plot for plots in figures.values() for plot in plots]
    script, divs = components(flat) if flat else ("", ())
    rest = iter(divs)
    charts = {name: [(plot.name, Markup(next(rest))) for plot in plots] for name, plots in figures.items() if plots}
    environment = Environment(
        loader=PackageLoader("rookworld_trl.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    cards = [card for run in runs for card in boards.gallery(run.name, run.evaluations)] if boards else []
    return environment.get_template("report.html.jinja").render(
        title=", ".join(run.name for run in runs),
        runs=[_about(run) for run in runs],
        headlines=[{"run": run.name, **_headline(row)} for run in runs for row in run.comparisons if row["headline"]],
        losses=[_losses(run) for run in runs],
        metrics=_table(runs, [run.comparisons for run in runs]),
        groups=_table(runs, [run.groups for run in runs]),
        charts=charts,
        cards=cards,
        kinds=list(dict.fromkeys(kind for card in cards for kind in card.kinds)),
        definitions=Markup(boards.shared_definitions()) if boards and cards else "",
        board=boards.legend if boards else {},
        prefix=PREFIX,
        bokeh=Markup(Resources(mode="inline", components=["bokeh"]).render_js()) if flat else "",
        script=Markup(script),
        markup=Markup,
    )


def _about(run: Run) -> dict[str, Any]:
    """What heads the page: how far the run is, and what it was made with."""
    step = int(run.steps[-1]["step"]) if run.steps else 0
    model, seed, steps = (run.summary.get(name) for name in ("model", "seed", "steps"))
    state = "finished" if run.summary else "not finished: it is going on, or ended before its last step"
    if run.summary.get("stop_reason"):
        state = f"stopped: {run.summary['stop_reason']}"
    parts = [*([f"model {Path(str(model)).name}"] if model else []), f"{steps or step} steps", state]
    parts += [f"seed {seed}"] if seed is not None else []
    best = next((row for row in reversed(run.steps) if "eval_best" in row), None)
    if best:
        parts.append(f"best held-out value {best['eval_best']:.4g} at step {best['eval_best_step']:g}")
    seconds = run.summary.get("seconds", {})
    if not seconds and run.steps and "seconds" in run.steps[-1]:
        seconds = {"train": run.steps[-1]["seconds"]}
    facts = {name: value for name, value in run.summary.items() if name not in _NOT_FACTS}
    return {
        "name": run.name,
        "parts": parts,
        "seconds": {phase: f"{value / 60:.1f} min" for phase, value in seconds.items()},
        "last": {name: _plain(value) for name, value in (run.steps[-1] if run.steps else {}).items()},
        "facts": json.dumps(facts, indent=1, default=str) if facts else "",
    }


def _headline(row: Mapping[str, Any]) -> dict[str, Any]:
    spec = row["format"]
    return {
        "label": f"{PREFIX.get(row['task'], row['task'])} {row['label']}, {row['mode']}",
        "before": as_text(row["before"], spec, unit=" %"),
        "after": as_text(row["after"], spec, unit=" %"),
        "change": "" if row["difference"] is None else changed(row),
        "kind": _kind(row),
        "items": row["items"],
        "trivial": players_of(row),
    }


def _kind(row: Mapping[str, Any]) -> str:
    """A change is a `gain` or a `loss`, or nothing where it is not significant or is neither."""
    if not (row["significant"] and row["better"]):
        return ""
    return "loss" if row["loss"] else "gain"


def _losses(run: Run) -> dict[str, Any]:
    """The significant losses, and the sentences that say how many there are among how many."""
    lines, found = [], []
    for of_what, rows in (("metrics", run.comparisons), (GROUPED, run.groups)):
        lost, words = losses(rows, of_what)
        lines += [words] if words else []
        heads = [(_headline(row), row.get("group", "")) for row in lost]
        found += [head | {"label": f"{head['label']} {group}".strip()} for head, group in heads]
    return {"run": run.name, "lines": lines, "rows": found}


def _table(runs: Sequence[Run], rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Rows by task, decoding, group and metric, with the columns of each run side by side."""
    merged: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = {}
    for place, of_run in enumerate(rows):
        for row in of_run:
            merged.setdefault((row["task"], row["mode"], row.get("group", ""), row["metric"]), {})[place] = row
    trained = [any(row["after"] is not None for row in of_run) for of_run in rows]
    lines = []
    for (task, mode, group, _), found in merged.items():
        known = max(found.values(), key=lambda row: "clusters" in row)  # an unfinished run knows no label and format
        cells = []
        for place in range(len(runs)):
            whole = {**found[place], "label": known["label"], "format": known["format"]} if place in found else None
            cells += _cells(whole)[: 3 if trained[place] else 1]
        head = {"task": task, "mode": mode, "group": group, "headline": known["headline"]}
        label = f"{PREFIX.get(task, '')} {known['label']}".strip()
        lines.append({**head, "label": label, "cells": cells, "trivial": players_of(known), "items": known["items"]})
    columns = [
        f"{run.name}: {name}" if len(runs) > 1 else name
        for run, after in zip(runs, trained, strict=True)
        for name in (("before", "after", "change") if after else ("before",))
    ]
    return {"rows": lines, "columns": columns, "grouped": any(line["group"] for line in lines)}


def _cells(row: Mapping[str, Any] | None) -> list[Cell]:
    """Before, after, and change with its interval."""
    if row is None:
        return [{"text": "", "value": "", "kind": ""}] * 3
    head = _headline(row)
    texts = (head["before"], head["after"] if row["after"] is not None else "", head["change"])
    values = (row["before"], row["after"], row["difference"])
    return [
        {"text": text, "value": "" if value is None else value, "kind": kind}
        for text, value, kind in zip(texts, values, ("", "", head["kind"]), strict=True)
    ]


def _plain(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
