"""One picture of a run: held-out results before and after, and how training went."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from rookworld_trl.reports.run import Run, change, losses, shown

# Okabe and Ito's palette, told apart by every kind of colour vision; before/after also differ in lightness.
COLORS = {"policy": "#0072B2", "environment": "#D55E00"}
NEUTRAL, BEFORE, INK, GRID = "#333333", "#C4C9CF", "#222222", "#E6E6E6"
PREFIX = {"policy": "P:", "environment": "A:"}

WIDTH, DPI = 11.0, 150
_LINE_HEIGHT = 0.2  # of text under the bars, in inches
_TRIVIAL_STYLES: tuple[Any, ...] = (":", "--", "-.", (0, (8, 2)))
_SMOOTHING = 0.15  # of the steps, the width of the running mean


def plot_run(run: Run, path: Path | str) -> Path:
    """Draw a run as PNG: before/after bars and losses (if it was evaluated), then a panel for each quantity it logged.

    Raises:
        ValueError: the run logged nothing that can be drawn.
    """
    panels = [panel for panel in PANELS if any(len(run.series(key)[0]) for key in panel[1])]
    bars = [row for row in run.comparisons if row.get("headline") and row["difference"] is not None]
    if not panels and not bars:
        raise ValueError(f"run '{run.name}' logged nothing to draw: metrics.jsonl needs 'reward', 'kl', ... by step")
    rows = -(-len(panels) // 3)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.04, wspace=0.02)
    lines = _loss_lines(run.comparisons) if bars else []
    heights = ([3.0, _LINE_HEIGHT * len(lines)] if bars else []) + [2.5] * rows
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.45), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    if bars:
        _draw_bars(figure.add_subplot(grid[0, :]), bars)
        text = figure.add_subplot(grid[1, :])
        text.axis("off")
        text.text(0, 1, "\n".join(lines), va="top", fontsize=9, color=INK, transform=text.transAxes)
    for i, (title, keys, draw) in enumerate(panels):
        axes = figure.add_subplot(grid[2 * bool(bars) + i // 3, i % 3])
        _style(axes, title)
        draw(axes, run, keys)
        axes.set_xlabel("training step", color=NEUTRAL)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
    style: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": INK}
    figure.suptitle(_title(run), x=0.012, ha="left", parse_math=False, **style)  # names may have dollar signs
    figure.savefig(path)
    return Path(path)


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred running mean; the window shrinks at both ends, so that no value is invented there."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _loss_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The significant losses, three a line, or that there are none."""
    found, judged = losses(rows)
    if not found:
        return [f"Significant losses: none among {judged} metrics"]
    texts = [
        f"{PREFIX.get(row['task'], '')} {row.get('label', row['metric'])}, {row['mode']} {change(row)}" for row in found
    ]
    lines = ["    ".join(texts[first : first + 2]) for first in range(0, len(texts), 2)]
    return [f"Significant losses: {len(found)} of {judged} metrics", *lines]


def _draw_bars(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    _style(
        axes, "Held-out result before (grey) and after (colour) training; whisker: 95 % interval of the paired change"
    )
    places = np.arange(len(rows), dtype=np.float64)
    styles: dict[str, Any] = {}
    for place, row in zip(places, rows, strict=True):
        color, spec = COLORS.get(row["task"], NEUTRAL), row.get("format", "percent")
        before, after = row["before"], row["after"]
        whisker = [[max(0.0, row["difference"] - row["ci_low"])], [max(0.0, row["ci_high"] - row["difference"])]]
        axes.bar(place - 0.19, before, 0.34, color=BEFORE)
        axes.bar(place + 0.19, after, 0.34, color=color)
        axes.errorbar(place + 0.19, after, yerr=whisker, color=INK, capsize=4, linewidth=1.3)
        # A label stands above the lines of trivial players that would run through it.
        lines = list((row.get("baselines") or {}).values())
        tops = [
            max([top, *(line for line in lines if top < line + 0.02 < top + 0.15)])
            for top in (before, after + whisker[1][0])
        ]
        texts = [shown(before, spec), f"{shown(after, spec)}  ({shown(row['difference'], spec, '+')})"]
        for text, top, side in zip(texts, tops, (-1, 1), strict=True):
            axes.annotate(
                text,
                (place + 0.02 * side, max(top, 0.0)),
                (0, 3),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                color="#666666" if side < 0 else INK,
                fontweight="bold" if row["significant"] and side > 0 else "normal",
                fontsize=9,
            )
        for player, value in (row.get("baselines") or {}).items():
            label = "" if player in styles else player  # once in the legend
            style = styles.setdefault(player, _TRIVIAL_STYLES[len(styles) % len(_TRIVIAL_STYLES)])
            axes.hlines(value, place - 0.42, place + 0.42, color="#9467BD", linewidth=1.5, linestyle=style, label=label)
    labels = [
        f"{PREFIX.get(row['task'], '')} {row.get('label', row['metric'])}\n{row['mode']}, {row['items']} items"
        for row in rows
    ]
    axes.set_xticks(places, labels)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    ends = [
        max(row["before"], row["after"] + row["ci_high"] - row["difference"], *(row.get("baselines") or {}).values())
        for row in rows
    ]
    bottoms = [min(row["before"], row["after"] + row["ci_low"] - row["difference"], 0.0) for row in rows]
    axes.set_ylim(min(bottoms) * 1.13, max(*ends, 0.01) * 1.13)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if styles:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=len(styles), fontsize=9)


def _draw_reward(axes: Axes, run: Run, keys: Sequence[str]) -> None:
    present = [key for key in keys if len(run.series(key)[0])]
    for key in present if len(present) == 1 else present[1:]:  # the sum of both says nothing beside its parts
        task = next((task for task in COLORS if key.startswith(f"rewards/{task}")), "")
        _draw_line(axes, *run.series(key), COLORS.get(task, NEUTRAL), PREFIX.get(task, "all") + " " + task)
    axes.legend(frameon=False, loc="best", handlelength=1.2, fontsize=9)


def _draw_plain(axes: Axes, run: Run, keys: Sequence[str]) -> None:
    for key in keys:
        _draw_line(axes, *run.series(key), NEUTRAL)


def _draw_from_zero(axes: Axes, run: Run, keys: Sequence[str]) -> None:
    _draw_plain(axes, run, keys)
    axes.set_ylim(bottom=0)


def _draw_informative(axes: Axes, run: Run, keys: Sequence[str]) -> None:
    _draw_line(axes, *run.series(keys[0]), "#009E73")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_share(axes: Axes, run: Run, keys: Sequence[str]) -> None:
    for key in keys:
        task = key.split("/")[0]
        label = {"best_legal": "P: legal", "skill": "P: skill", "exact": "A: exact"}[key.split("/")[1]]
        if len(run.series(key)[0]):
            _draw_line(axes, *run.series(key), "#009E73" if label == "P: skill" else COLORS[task], label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, loc="best", handlelength=1.2, fontsize=9)


def _draw_line(
    axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], color: str, label: str | None = None
) -> None:
    width = max(1, round(_SMOOTHING * len(values)))
    if width < 3:
        axes.plot(steps, values, color=color, linewidth=1.8, label=label, marker="o" if len(steps) < 2 else None)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth(values, width), color=color, linewidth=2.0, label=label)


Draw = Callable[[Axes, Run, Sequence[str]], None]

# Title with unit, logged keys, how to draw them; a panel with none of its keys logged is left out.
PANELS: list[tuple[str, Sequence[str], Draw]] = [
    (
        "Mean reward",
        ["reward"] + [f"rewards/{task}_reward{form}/mean" for task in COLORS for form in ("", "_continuous")],
        _draw_reward,
    ),
    ("Headline metrics on training samples", ["policy/best_legal", "policy/skill", "environment/exact"], _draw_share),
    ("Groups whose rewards differ", ["groups/informative"], _draw_informative),
    ("KL to the reference (nats per token)", ["kl"], _draw_from_zero),
    ("Entropy (nats per token)", ["entropy"], _draw_plain),
    ("Completion length (tokens)", ["completions/mean_length"], _draw_plain),
]


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", labelsize=9, colors=NEUTRAL, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _title(run: Run) -> str:
    model = run.summary.get("model")
    steps = int(run.steps[-1]["step"]) if run.steps else 0
    parts = [run.name, Path(str(model)).name if model else "", f"{steps} steps of GRPO" if steps else ""]
    return "  ·  ".join(part for part in parts if part)
