"""A run's curves, several runs over each other, and the forest of its changes, as Bokeh figures."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    FactorRange,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    Span,
    WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.transform import dodge
from numpy.typing import NDArray

from rookworld_trl.measuring.tables import as_text, changed
from rookworld_trl.reports.run import Run

# Okabe and Ito's palette, told apart by every kind of colour vision; runs side by side take it too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1", "#A6761D")
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
MARKERS = ("circle", "diamond", "triangle", "square")  # greedy, sampled
LEVELS = {"green": "#009E73", "yellow": "#E69F00", "red": "#D55E00"}
BEFORE, INK, GRID = "#8A9099", "#333333", "#E6E6E6"
PREFIX = {"policy": "P:", "environment": "A:"}
HEIGHT = 250
POINTS = 600  # a line has at most; more are averaged
_SMOOTHING = 0.08  # of the points, the width of the running mean


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: its title with unit, and key and label of each line; a line that no run logged is left out."""

    title: str
    lines: tuple[tuple[str, str], ...]
    percent: bool = False


def _fields(task: str, *names: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{task}/{name}", name.replace("_", " ")) for name in names)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Rewards": (
        Panel("Mean reward, sampled", (("reward", "all"), ("reward/policy", "P:"), ("reward/environment", "A:"))),
        Panel(
            "P: by field, share of the samples",
            _fields("policy", "parsed", "best_legal", "candidates_legal_distinct", "best_in_moves", "best_in_top5")
            + _fields("policy", "top1"),
            percent=True,
        ),
        Panel("P: value, skill and evals", _fields("policy", "best_value", "skill", "evals_score"), percent=True),
        Panel(
            "A: by field, share of the samples",
            _fields("environment", "exact", "fen_exact", "placement_exact", "reward_exact", "similarity", "parsed"),
            percent=True,
        ),
        Panel(
            "Groups whose rewards differ",
            (
                ("groups/informative", "all"),
                ("groups/informative/policy", "P:"),
                ("groups/informative/environment", "A:"),
            ),
            percent=True,
        ),
        Panel("Log-prob of right answers, gain (nats)", (("truth/logp_gain", "gain"),)),
        Panel("Expected reward, summed exactly", (("exact/value", "value"), ("exact/outside", "illegal mass"))),
    ),
    "Drift": (
        Panel("KL to the reference (nats a token)", (("kl", "KL"),)),
        Panel("β, the KL coefficient", (("kl/coefficient", "β"),)),
        Panel("KL of a completion (nats)", (("kl/sequence_mean", "mean"), ("kl/sequence_p95", "95th percentile"))),
        Panel("Entropy (nats a token)", (("entropy", "entropy"),)),
        Panel(
            "Clipped tokens",
            (("clip_ratio/region_mean", "all"), ("clip_ratio/low_mean", "low"), ("clip_ratio/high_mean", "high")),
            percent=True,
        ),
        Panel(
            "Completion length (tokens)", (("completions/mean_length", "mean"), ("completions/max_length", "longest"))
        ),
    ),
    "Optimizer and machine": (
        Panel("Learning rate", (("learning_rate", "rate"),)),
        Panel("Gradient norm", (("grad_norm", "norm"),)),
        Panel(
            "Time of a step and its parts (s)",
            (
                ("step_time", "step"),
                ("perf/seconds_sampling", "sampling"),
                ("perf/seconds_rewards", "rewards"),
                ("perf/seconds_learning", "learning"),
            ),
        ),
        Panel("Sampling (s a completion)", (("rollout/seconds_per_sample", "seconds"),)),
        Panel(
            "Memory (GB), peaks of the run and of a step's phases",
            (
                ("perf/memory_gb", "run"),
                ("perf/memory_rss_gb", "in use"),
                ("perf/memory_rollout_gb", "rollout"),
                ("perf/memory_scoring_gb", "scoring"),
                ("perf/memory_learn_gb", "learning"),
            ),
        ),
    ),
}
HELD_OUT = Panel(
    "Held-out metrics while training",
    (
        ("eval_policy/best_legal", "P: B legal"),
        ("eval_policy/skill", "P: skill"),
        ("eval_environment/exact", "A: exact"),
        ("eval_reward", "reward"),
    ),
    percent=True,
)


def training_figures(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The figures of each section that has any, all with one range of steps; health events are lines across them."""
    last = max((run.steps[-1]["step"] for run in runs if run.steps), default=1)
    steps = Range1d(0, last, bounds="auto")
    sections = {"Held out": (HELD_OUT, *_further(runs)), **SECTIONS}
    found = {
        name: [plot for panel in panels for plot in _draw(panel, runs, steps)] for name, panels in sections.items()
    }
    found["Health"] = list(_health(runs, steps))
    return {name: plots for name, plots in found.items() if plots}


def _further(runs: Sequence[Run]) -> Iterator[Panel]:
    """What the evaluation during training logs under other names than the headlines', such as a user's own."""
    known = {key for key, _ in HELD_OUT.lines}
    logged = {key for run in runs for row in run.steps for key in row if key.startswith("eval_")}
    standard = any(key.startswith(("eval_policy/", "eval_environment/")) for key in logged)
    if not standard:
        for key in sorted(logged - known - {"eval_best", "eval_best_step", "eval_runtime"}):
            yield Panel(f"Held out: {key.removeprefix('eval_')}", ((key, key.removeprefix("eval_")),))


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred running mean; the window shrinks at both ends, so that no value is invented there."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def thinned(values: NDArray[np.float64], points: int = POINTS) -> NDArray[np.float64]:
    """At most so many values, each the mean of equally many neighbours but the last."""
    size = -(-len(values) // points)
    return values if size <= 1 else np.array([values[i : i + size].mean() for i in range(0, len(values), size)])


def _plot(title: str, height: int = HEIGHT, **options: Any) -> Any:
    """An empty figure that fills its column; the page writes its `name` above it.

    Dragging scrolls the page until panning is chosen: phones need it.
    """
    pan, zoom = PanTool(dimensions="width"), WheelZoomTool(dimensions="width")
    options = {"name": title, "height": height, "sizing_mode": "stretch_width", **options}
    plot = figure(tools=[pan, zoom, ResetTool()], **options)
    plot.toolbar.active_drag = plot.toolbar.active_scroll = None
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.outline_line_color, plot.min_border_right = None, 12
    plot.xgrid.grid_line_color, plot.ygrid.grid_line_color = None, GRID
    plot.axis.axis_line_color = plot.axis.minor_tick_line_color = plot.axis.major_tick_line_color = None
    plot.axis.major_label_text_color, plot.axis.major_label_text_font_size = INK, "11px"
    return plot


def _draw(panel: Panel, runs: Sequence[Run], steps: Range1d) -> Iterator[Any]:
    lines = [(key, label) for key, label in panel.lines if any(len(run.series(key)[0]) for run in runs)]
    if not lines:
        return
    plot, legend, bold = _plot(panel.title, x_range=steps), [], []
    for number, run in enumerate(runs):
        for place, (key, label) in enumerate(lines):
            x, y = run.series(key)
            if not len(x):
                continue
            several = len(runs) > 1
            color = PALETTE[(number if several else place) % len(PALETTE)]
            dash = DASHES[place % len(DASHES)] if several else "solid"
            name = f"{run.name}: {label}" if several and len(lines) > 1 else run.name if several else label
            drawn = _line(plot, thinned(x), thinned(y), color, dash, name)
            bold.append(drawn[-1])
            legend.append(LegendItem(label=name, renderers=drawn))
        for event in run.events:
            if event.get("metric") in dict(lines):
                color = LEVELS.get(event.get("to", ""), LEVELS["red"])
                plot.add_layout(Span(location=event["step"], dimension="height", line_color=color, line_dash="dotted"))
    value = "@y{0.0 %}" if panel.percent else "@y{0.0000 a}"
    tips = [("", "@name"), ("step", "@x{0}"), ("value", value)]
    plot.add_tools(HoverTool(renderers=bold, tooltips=tips, mode="mouse", line_policy="nearest"))
    if panel.percent:
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    values = np.concatenate([run.series(key)[1] for run in runs for key, _ in lines])
    if np.ptp(values) <= 1e-9 * np.abs(values).max():  # constant: Bokeh would enlarge its rounding
        plot.y_range = Range1d(min(0.0, 2 * values[0]), max(0.0, 2 * values[0]) or 1.0)
    if len(legend) > 1:
        _add_legend(plot, legend)
    plot.xaxis.axis_label, plot.xaxis.axis_label_text_font_size = "step", "11px"
    plot.xaxis.axis_label_text_font_style = "normal"
    yield plot


def _add_legend(plot: Any, items: list[LegendItem]) -> None:
    """Below the plot, in columns that fit a phone; a click hides a line."""
    longest = max(len(str(item.label.value)) for item in items)
    legend = Legend(items=items, click_policy="hide", ncols=max(1, 44 // (longest + 6)))
    legend.label_text_font_size, legend.border_line_color, legend.padding = "11px", None, 2
    legend.label_height = legend.glyph_height = 14
    legend.spacing, legend.margin = 2, 4
    plot.add_layout(legend, "below")
    plot.height += 16 * -(-len(items) // legend.ncols)


def _line(plot: Any, x: Any, y: Any, color: str, dash: str, name: str) -> list[Any]:
    """A line; a long one as a running mean over its own values, faint."""
    width = round(_SMOOTHING * len(y))
    if width < 3:
        source = ColumnDataSource({"x": x, "y": y, "name": [name] * len(x)})
        line = plot.line("x", "y", source=source, color=color, line_width=2, line_dash=dash)
        return [plot.scatter("x", "y", source=source, color=color, size=5), line]
    raw = plot.line(x, y, color=color, line_width=1, line_alpha=0.22)
    source = ColumnDataSource({"x": x, "y": smooth(y, width), "name": [name] * len(x)})
    return [raw, plot.line("x", "y", source=source, color=color, line_width=2.2, line_dash=dash)]


def _health(runs: Sequence[Run], steps: Range1d) -> Iterator[Any]:
    """Each change of a metric's level, and each skipped step, on the axis of steps."""
    rows = []
    for run in runs:
        for event in run.events:
            name = str(event.get("metric", "skipped step"))
            what = f"{event['from']} → {event['to']}" if "to" in event else ", ".join(event.get("faults", ["skipped"]))
            value = event.get("value")
            rows.append(
                {
                    "x": event["step"],
                    "y": f"{run.name}: {name}" if len(runs) > 1 else name,
                    "color": LEVELS.get(event.get("to", ""), LEVELS["red"]),
                    "what": what,
                    "value": f"{value:.4g}" if isinstance(value, int | float) else str(value or ""),
                }
            )
    if not rows:
        return
    names = list(dict.fromkeys(row["y"] for row in rows))
    options = {"x_range": steps, "y_range": FactorRange(factors=names[::-1])}
    plot = _plot("Health: when a metric entered its green, yellow or red band", 90 + 26 * len(names), **options)
    source = ColumnDataSource({key: [row[key] for row in rows] for key in rows[0]})
    marks = plot.scatter("x", "y", source=source, color="color", size=11, line_color="white")
    tips = [("step", "@x{0}"), ("", "@y"), ("", "@what"), ("value", "@value")]
    plot.add_tools(HoverTool(renderers=[marks], tooltips=tips))
    plot.xaxis.axis_label, plot.xaxis.axis_label_text_font_style = "step", "normal"
    yield plot


def forests(runs: Sequence[Run]) -> list[Any]:
    """Every change that is gain or loss with its interval, in points of a hundred: one figure for each task."""
    rows = [
        (number, row)
        for number, run in enumerate(runs)
        for row in run.comparisons
        if row["difference"] is not None and row["better"] and row["format"] in ("percent", ".3f")
    ]
    return [
        _forest(task, [(number, row) for number, row in rows if row["task"] == task], runs)
        for task in dict.fromkeys(row["task"] for _, row in rows)
    ]


def _forest(task: str, rows: Sequence[tuple[int, dict[str, Any]]], runs: Sequence[Run]) -> Any:
    """A line for each metric; in it one below the other the runs, and of each the ways of decoding by their marks."""
    several, modes = len(runs) > 1, list(dict.fromkeys(row["mode"] for _, row in rows))
    factors = list(dict.fromkeys(_factor(row) for _, row in rows))[::-1]
    title = f"{PREFIX.get(task, task)} change by training, points of 100, with its 95 % interval"
    places = [(number, mode) for number in range(len(runs)) for mode in modes]
    plot = _plot(title, 80 + len(factors) * (16 + 9 * len(places)), y_range=FactorRange(factors=factors))
    plot.add_layout(Span(location=0, dimension="height", line_color=INK, line_width=1))
    points, legend = [], []
    for place, (number, mode) in enumerate(places):
        mine = [row for each, row in rows if each == number and row["mode"] == mode]
        if not mine:
            continue
        data = {
            "factor": [_factor(row) for row in mine],
            "x": [100 * row["difference"] for row in mine],
            "low": [100 * row["ci_low"] if row["ci_low"] is not None else math.nan for row in mine],
            "high": [100 * row["ci_high"] if row["ci_high"] is not None else math.nan for row in mine],
            "color": [PALETTE[number % len(PALETTE)] if several else _verdict(row) for row in mine],
            "fill": [float(row["significant"]) for row in mine],
            "name": [f"{runs[number].name}, {mode}" if several else mode] * len(mine),
            "text": [_before_after(row) for row in mine],
        }
        source = ColumnDataSource(data)
        height = dodge("factor", 0.6 * ((len(places) - 1) / 2 - place) / len(places), range=plot.y_range)
        bar = plot.segment("low", height, "high", height, source=source, color="color", line_width=2)
        options = {"source": source, "color": "color", "fill_alpha": "fill", "line_width": 2}
        marker = MARKERS[modes.index(mode) % len(MARKERS)]
        points.append(plot.scatter("x", height, size=8, marker=marker, **options))
        legend.append(LegendItem(label=data["name"][0], renderers=[points[-1], bar]))
    plot.add_tools(HoverTool(renderers=points, tooltips=[("", "@factor"), ("", "@name"), ("", "@text")]))
    plot.ygrid.grid_line_color, plot.xgrid.grid_line_color = None, GRID
    _add_legend(plot, legend)
    return plot


def _factor(row: dict[str, Any]) -> str:
    """The metric's label in lines that leave a phone some room."""
    return textwrap.fill(row["label"], 20)


def _verdict(row: dict[str, Any]) -> str:
    """Blue for a significant gain, red for a significant loss, grey for neither."""
    if not row["significant"]:
        return BEFORE
    return LEVELS["red"] if row["loss"] else PALETTE[0]


def _before_after(row: dict[str, Any]) -> str:
    spec = row["format"]
    return f"{as_text(row['before'], spec, unit=' %')} → {as_text(row['after'], spec, unit=' %')}, {changed(row)}"
