"""Held-out results over CPU minutes, and how many times longer one arm takes to what another has reached.

    python -m benchmarks.evidence.curves --split test --arms exact sampled soft gold

Every point is a run of its own, whose rate falls to 0 by its end; all that is stored is taken. Writes
`benchmarks/results/evidence/SPLIT-curves.json` and the figure of `docs/evidence.md`, and prints both tables.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, write_report
from benchmarks.evidence import store
from benchmarks.evidence.statistics import clusters, draws
from rookworld_trl.measuring.intervals import MIN_CLUSTERS, Array, percentile_interval

FIGURE = ROOT / "docs" / "images" / "evidence.svg"
BASE, OURS, RIVAL = "base", "exact", "sampled"
SHOWN = {"best_legal": "legality", "skill": "skill", "exact": "exactness"}
COLORS = {"exact": "#1b7837", "sampled": "#c2185b", "soft": "#5e6ad2", "gold": "#b8860b"}
LABELS = {"exact": "exact gradient", "sampled": "sampled GRPO", "soft": "SFT, soft labels", "gold": "SFT"}
Curve = dict[tuple[str, float], Array]  # (arm, CPU minutes) -> draws of one metric; ("base", 0.0) has no training


def collect(split: str, arms: list[str]) -> tuple[dict[tuple[str, str, str], Curve], int]:
    """(task, mode, metric) -> the bootstrap's draws of every point, over the same games and each point's own seeds;
    and the fewest games that one of these rests on."""
    runs: dict[tuple[str, float], list[store.Result]] = {}
    for name in store.names(split):
        found = store.read(split, name)
        if found.facts["arm"] in (BASE, *arms):
            runs.setdefault((found.facts["arm"], found.facts["minutes"]), []).append(found)
    if (BASE, 0.0) not in runs or len(runs) < 2:
        where = store.path_of(split)
        raise SystemExit(f"{where} holds no runs to draw; `python -m benchmarks.evidence run` makes them")
    first = runs[BASE, 0.0][0]
    for point, found_runs in runs.items():
        if any(each.keys != first.keys for each in found_runs):
            raise SystemExit(f"{point}: other items than the base's; remove it and run")
    curves: dict[tuple[str, str, str], Curve] = {}
    points, count = sorted(runs), max(map(len, first.games.values()))
    for task, mode in first.terms:
        sides = [[each.terms[task, mode] for each in runs[point]] for point in points]
        drawn, of_metric = draws(sides, first.games[task]), clusters(sides, first.games[task])
        for column, metric in enumerate(store.metrics_of(task)):
            if metric.name in SHOWN:
                curve = {point: drawn[:, i, column] for i, point in enumerate(points)}
                curves[task, mode, metric.name], count = curve, min(count, int(of_metric[column]))
    if count < MIN_CLUSTERS:
        raise SystemExit(
            f"{store.FOLDER / split}: {count} games are too few for intervals; measure {MIN_CLUSTERS} or more"
        )
    return curves, count


def minutes_to(quality: Array, minutes: Array, values: Array) -> Array:
    """CPU minutes after which a curve first reaches `quality`, linear between its points; inf where it never does.

    Args:
        quality: (draws,), what is to be reached.
        minutes: (points,), ascending, the first 0.
        values: (draws, points), the curve.
    """
    found = np.where(values[:, 0] >= quality, 0.0, np.inf)
    for i in range(1, len(minutes)):
        low, high = values[:, i - 1], values[:, i]
        with np.errstate(invalid="ignore", divide="ignore"):
            at = minutes[i - 1] + (minutes[i] - minutes[i - 1]) * (quality - low) / (high - low)
        found = np.where(np.isinf(found) & (high >= quality), at, found)
    return found


def ratio(curve: Curve, rival: tuple[str, float], ours: str = OURS) -> dict[str, float]:
    """How many times longer than `ours` the rival took to where it is: median and 95 % interval over the draws.

    inf: ours begins there, for the rival has gained nothing. 0: ours never gets there within what was measured.
    """
    minutes = np.array([0.0, *sorted(m for arm, m in curve if arm == ours)])
    values = np.stack([curve[BASE, 0.0], *(curve[ours, m] for m in minutes[1:])], axis=1)
    needed = minutes_to(curve[rival], minutes, values)
    with np.errstate(divide="ignore"):
        times = np.sort(np.where(np.isinf(needed), 0.0, rival[1] / needed))
    # No interpolation between draws: some are infinite.
    low, middle, high = (float(times[int(share * (len(times) - 1))]) for share in (0.025, 0.5, 0.975))
    return {"median": middle, "ci_low": low, "ci_high": high, "no_gain": float(np.isinf(times).mean())}


def report(curves: dict[tuple[str, str, str], Curve], games: int) -> dict[str, Any]:
    points, ratios = [], []
    for (task, mode, metric), curve in curves.items():
        what = {"task": task, "mode": mode, "metric": metric}
        for (arm, minutes), drawn in sorted(curve.items()):
            low, high = percentile_interval(drawn, games)
            here = {"arm": arm, "minutes": minutes, "mean": float(np.nanmean(drawn)), "ci_low": low, "ci_high": high}
            points.append({**what, **here})
        for arm, minutes in sorted(curve):
            if arm == RIVAL:
                ratios.append({**what, "arm": arm, "minutes": minutes, **ratio(curve, (arm, minutes))})
    return {"points": points, "times_longer": ratios}


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """One panel a headline: greedy results over CPU minutes, with intervals; the base as a line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # the same bytes from the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHOWN), figsize=(11, 3.4), layout="constrained")
    for panel, (metric, title) in zip(panels, SHOWN.items(), strict=True):
        greedy = [p for p in points if p["metric"] == metric and p["mode"] == "greedy"]
        (base,) = [p for p in greedy if p["arm"] == BASE]
        panel.axhline(base["mean"], color="#666", linewidth=1, linestyle="--", label="before training")
        for number, arm in enumerate(dict.fromkeys(p["arm"] for p in greedy if p["arm"] != BASE)):
            line = sorted((p for p in greedy if p["arm"] == arm), key=lambda p: p["minutes"])
            x, y = [p["minutes"] * 1.03**number for p in line], [p["mean"] for p in line]  # beside one another
            errors = [[p["mean"] - p["ci_low"] for p in line], [p["ci_high"] - p["mean"] for p in line]]
            look = {"label": LABELS.get(arm, arm), "color": COLORS.get(arm), "marker": "o", "markersize": 4}
            panel.errorbar(x, y, errors, capsize=2, **look)
        panel.set(title=title, xlabel="CPU minutes, one core", xscale="log")
        longest = max(p["minutes"] for p in greedy)
        ticks = [2**power for power in range(int(np.log2(longest)) + 1)]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def as_markdown(found: dict[str, Any]) -> str:
    greedy = [p for p in found["points"] if p["mode"] == "greedy"]
    names = list(dict.fromkeys(p["metric"] for p in greedy))
    lines = ["| arm | CPU minutes | " + " | ".join(SHOWN[name] for name in names) + " |"]
    lines.append("|---|---:|" + "---|" * len(names))
    for arm, minutes in dict.fromkeys((p["arm"], p["minutes"]) for p in greedy):
        cells = []
        for name in names:
            (p,) = [p for p in greedy if (p["arm"], p["minutes"], p["metric"]) == (arm, minutes, name)]
            cells.append(f"{p['mean']:.3f} [{p['ci_low']:.3f}, {p['ci_high']:.3f}]")
        lines.append(f"| {arm} | {minutes:g} | " + " | ".join(cells) + " |")
    lines += ["", "| what sampled GRPO reached in | metric | decoding | it took times as long as the exact gradient |"]
    lines += ["|---|---|---|---|"]
    for r in found["times_longer"]:
        value = f"{r['median']:.1f} [{r['ci_low']:.1f}, {r['ci_high']:.1f}]".replace("inf", "∞")
        lines.append(f"| {r['minutes']:g} min | {SHOWN[r['metric']]} | {r['mode']} | {value} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--arms", nargs="+", default=["exact", "sampled", "soft", "gold"])
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    found = report(*collect(arguments.split, arguments.arms))
    write_report(store.FOLDER / f"{arguments.split}-curves.json", {"split": arguments.split, **found})
    draw(found["points"], arguments.figure)
    print(as_markdown(found))


if __name__ == "__main__":
    main()
