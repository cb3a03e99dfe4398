"""A run's curves as Bokeh figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
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
from numpy.typing import NDArray

from rookworld_trl.reports.run import Run

# Okabe and Ito's palette, told apart by every kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1", "#A6761D")
LEVELS = {"green": "#009E73", "yellow": "#E69F00", "red": "#D55E00"}
INK, GRID = "#333333", "#E6E6E6"
PREFIX = {"policy": "P:", "environment": "A:"}
HEIGHT = 250
POINTS = 600  # a line has at most; more are averaged
_SMOOTHING = 0.08  # of the points, the width of the running mean


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: its title with unit, and key and label of each line; a line that was not logged is left out."""

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


def training_figures(run: Run) -> dict[str, list[Any]]:
    """The figures of each section that has any, all with one range of steps; health events are lines across them."""
    steps = Range1d(0, run.steps[-1]["step"] if run.steps else 1, bounds="auto")
    sections = {"Held out": (HELD_OUT, *_further(run)), **SECTIONS}
    found = {name: [plot for panel in panels for plot in _draw(panel, run, steps)] for name, panels in sections.items()}
    return {name: plots for name, plots in found.items() if plots}


def _further(run: Run) -> Iterator[Panel]:
    """What the evaluation during training logs under other names than the headlines', such as a user's own."""
    known = {key for key, _ in HELD_OUT.lines}
    logged = {key for row in run.steps for key in row if key.startswith("eval_")}
    standard = any(key.startswith(("eval_policy/", "eval_environment/")) for key in logged)
    if not standard:
        for key in sorted(logged - known - {"eval_best", "eval_best_step", "eval_runtime"}):
            yield Panel(f"Held out: {key.removeprefix('eval_')}", ((key, key.removeprefix("eval_")),))


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred running mean; the window shrinks at both ends, so that no value is invented there."""
    window = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thinned(values: NDArray[np.float64], points: int = POINTS) -> NDArray[np.float64]:
    """At most so many values, each the mean of equally many neighbours but the last."""
    size = -(-len(values) // points)
    return values if size <= 1 else np.array([values[i : i + size].mean() for i in range(0, len(values), size)])


def _plot(title: str, steps: Range1d) -> Any:
    """An empty figure that fills its column; the page writes its `name` above it.

    Dragging scrolls the page until panning is chosen: phones need it.
    """
    pan, zoom = PanTool(dimensions="width"), WheelZoomTool(dimensions="width")
    options = {"name": title, "height": HEIGHT, "sizing_mode": "stretch_width", "x_range": steps}
    plot = figure(tools=[pan, zoom, ResetTool()], **options)
    plot.toolbar.active_drag = plot.toolbar.active_scroll = None
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.outline_line_color, plot.min_border_right = None, 12
    plot.xgrid.grid_line_color, plot.ygrid.grid_line_color = None, GRID
    plot.axis.axis_line_color = plot.axis.minor_tick_line_color = plot.axis.major_tick_line_color = None
    plot.axis.major_label_text_color, plot.axis.major_label_text_font_size = INK, "11px"
    plot.xaxis.axis_label, plot.xaxis.axis_label_text_font_size = "step", "11px"
    plot.xaxis.axis_label_text_font_style = "normal"
    return plot


def _draw(panel: Panel, run: Run, steps: Range1d) -> Iterator[Any]:
    lines = [(label, *run.series(key)) for key, label in panel.lines if len(run.series(key)[0])]
    if not lines:
        return
    plot, legend, bold = _plot(panel.title, steps), [], []
    for color, (label, x, y) in zip(PALETTE, lines, strict=False):
        drawn = _line(plot, thinned(x), thinned(y), color, label)
        bold.append(drawn[-1])
        legend.append(LegendItem(label=label, renderers=drawn))
    for event in run.events:
        if event.get("metric") in dict(panel.lines):
            color = LEVELS.get(event.get("to", ""), LEVELS["red"])
            plot.add_layout(Span(location=event["step"], dimension="height", line_color=color, line_dash="dotted"))
    value = "@y{0.0 %}" if panel.percent else "@y{0.0000 a}"
    tips = [("", "@name"), ("step", "@x{0}"), ("value", value)]
    plot.add_tools(HoverTool(renderers=bold, tooltips=tips, mode="mouse", line_policy="nearest"))
    if panel.percent:
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    values = np.concatenate([y for _, _, y in lines])
    if np.ptp(values) <= 1e-9 * np.abs(values).max():  # constant: Bokeh would enlarge its rounding
        plot.y_range = Range1d(min(0.0, 2 * values[0]), max(0.0, 2 * values[0]) or 1.0)
    if len(legend) > 1:
        _add_legend(plot, legend)
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


def _line(plot: Any, x: Any, y: Any, color: str, name: str) -> list[Any]:
    """A line; a long one as a running mean over its own values, faint."""
    width = round(_SMOOTHING * len(y))
    if width < 3:
        source = ColumnDataSource({"x": x, "y": y, "name": [name] * len(x)})
        line = plot.line("x", "y", source=source, color=color, line_width=2)
        return [plot.scatter("x", "y", source=source, color=color, size=5), line]
    raw = plot.line(x, y, color=color, line_width=1, line_alpha=0.22)
    source = ColumnDataSource({"x": x, "y": smooth(y, width), "name": [name] * len(x)})
    return [raw, plot.line("x", "y", source=source, color=color, line_width=2.2)]
