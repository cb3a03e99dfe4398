"""The report: one HTML file with everything inside, which opens without a network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rookworld_trl.files import write_atomically
from rookworld_trl.measuring.comparison import losses
from rookworld_trl.measuring.tables import as_text, changed, players_of
from rookworld_trl.reports.charts import PREFIX, training_figures
from rookworld_trl.reports.run import GROUPED, HTML, Run, read_run

_NOT_FACTS = ("metrics", "headline", "losses", "groups", "seconds")


def write_report(folder: Path | str, output: Path | str | None = None, boards: Any = None) -> Path:
    """Write a run's report and return its path.

    Args:
        folder: the run's output folder.
        output: the file; None: `report.html` in the folder.
        boards: draws the run's held-out items, as the module `rookworld_trl.chess.boards` does by its `gallery`,
            `legend` and `shared_definitions`; None leaves them out.

    Raises:
        RunError: the folder holds no readable run.
    """
    run, path = read_run(folder), Path(folder, HTML) if output is None else Path(output)
    figures = training_figures(run)
    flat = [plot for plots in figures.values() for plot in plots]
    script, divs = components(flat) if flat else ("", ())
    rest = iter(divs)
    charts = {name: [(plot.name, Markup(next(rest))) for plot in plots] for name, plots in figures.items()}
    environment = Environment(
        loader=PackageLoader("rookworld_trl.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    cards = list(boards.gallery(run.name, run.evaluations)) if boards else []
    metrics, groups = (run.summary.get(name, []) for name in ("metrics", "groups"))
    page = environment.get_template("report.html.jinja").render(
        title=run.name,
        run=_about(run),
        headlines=[_headline(row) for row in metrics if row["headline"]],
        losses=_losses(metrics, groups),
        metrics=_table(metrics),
        groups=_table(groups),
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
    write_atomically(path, page)
    return path


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
        "last": {
            name: f"{value:.5g}" if isinstance(value, float) else str(value)
            for name, value in (run.steps[-1] if run.steps else {}).items()
        },
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


def _losses(metrics: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The significant losses, and the sentences that say how many there are among how many."""
    lines, found = [], []
    for of_what, rows in (("metrics", metrics), (GROUPED, groups)):
        lost, words = losses(rows, of_what)
        lines += [words] if words else []
        heads = [(_headline(row), row.get("group", "")) for row in lost]
        found += [head | {"label": f"{head['label']} {group}".strip()} for head, group in heads]
    return {"lines": lines, "rows": found}


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows as the page shows them: before, after and change with its interval."""
    lines = []
    for row in rows:
        head = _headline(row)
        cells = [
            {"text": head[name], "value": "" if value is None else value, "kind": kind}
            for name, value, kind in (
                ("before", row["before"], ""),
                ("after", row["after"], ""),
                ("change", row["difference"], head["kind"]),
            )
        ]
        line = {name: row[name] for name in ("task", "mode", "headline", "items")} | {"group": row.get("group", "")}
        label = f"{PREFIX.get(row['task'], '')} {row['label']}".strip()
        lines.append({**line, "label": label, "cells": cells, "trivial": head["trivial"]})
    return {"rows": lines, "grouped": any(line["group"] for line in lines)}
