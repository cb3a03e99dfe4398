"""Stored runs as a report: every arm's values, the comparisons that count, gains beside losses; and as text."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chess
import numpy as np

from benchmarks.common import shipped
from benchmarks.evidence import store
from benchmarks.evidence.players import trivial_players
from benchmarks.evidence.statistics import Estimate, Side, estimates, holm
from rookworld_trl.chess import policy
from rookworld_trl.chess.accuracy import item_key
from rookworld_trl.measuring.intervals import ratios

BASE, FREE = "base", "argmax_evals"  # no training; and, of the base's answers, the candidate with the best eval as B
MATERIAL = "most material"  # the trivial player who is better than the base
COMPARED = {"best_legal": "legality", "skill": "skill", "exact": "exactness"}  # what a win is counted on
Runs = Mapping[str, Sequence[store.Result]]  # by arm, the base first


def make(split: str, runs: Runs, ours: str, groups: bool) -> dict[str, Any]:
    """What is written of a comparison: `RULE.md` says what counts.

    Args:
        ours: the arm that is compared with every other one; all are compared with the base.
        groups: whether the headlines are told by group of items too.

    Raises:
        SystemExit: runs are of different items.
    """
    first = runs[BASE][0]
    for arm, each in ((arm, each) for arm, of_arm in runs.items() for each in of_arm):
        if each.keys != first.keys:
            raise SystemExit(f"{arm}, seed {each.facts['seed']}: other items than the base's; remove it and run")
    report: dict[str, Any] = {"split": split, "ours": ours}
    players = trivial_players(split, first)
    report["trivial players"] = {name: of for name, of in players.items() if name in COMPARED}
    for name, fact in (("minutes", "minutes"), ("updates", "steps"), ("samples", "samples")):
        report[name] = {arm: [each.facts[fact] for each in of_arm] for arm, of_arm in runs.items()}
    report["values"] = list(values(split, runs))
    changes = [*differences(runs, [(arm, BASE) for arm in runs if arm != BASE])]
    others = [(ours, arm) for arm in runs if arm not in (BASE, ours)] if ours in runs else []
    counted = [*changes, *differences(runs, others)]
    pairs = [row for row in counted if row["metric"] in COMPARED and row["mode"] == "greedy"]
    for pair, adjusted in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
        pair |= {"p_holm": adjusted, "win": adjusted < 0.05 and (below(pair) or above(pair))}
    report |= {"pairs": pairs, "changes": [row for row in changes if below(row) or above(row)]}
    if groups:
        of_item = groups_of(split)
        names = dict.fromkeys(group for keys in first.keys.values() for key in keys for group in of_item[key])
        report["groups"] = [
            {"group": group, **row}
            for group in names
            for row in differences(runs, [(arm, BASE) for arm in runs if arm != BASE], of_item, group)
            if row["metric"] in COMPARED and row["mode"] == "greedy"
        ]
    return report


def side(runs: Runs, arm: str, task: str, mode: str, inside: Any = slice(None)) -> Side:
    """An arm's runs on some items."""
    terms = [each.terms[task, mode] for each in runs[arm]]
    return Side([(top[inside], bottom[inside]) for top, bottom in terms], trained=arm not in (BASE, FREE))


def values(split: str, runs: Runs) -> Iterator[dict[str, Any]]:
    """Each arm's metrics, with the skill of whoever takes most material on the items that the arm moves legally."""
    first = runs[BASE][0]
    for task, mode in first.terms:
        names = [metric.name for metric in store.metrics_of(task)]
        for arm, of_arm in runs.items():
            by_run = np.stack([ratios(*each.terms[task, mode]) for each in of_arm])
            for i, found in enumerate(estimates(side(runs, arm, task, mode), first.games[task])):
                row = {"task": task, "mode": mode, "metric": names[i], "arm": arm}
                row |= {"mean": found.value, "by_seed": [float(value) for value in by_run[:, i]], **bounds(found)}
                if (names[i], mode) == ("skill", "greedy"):
                    players = [trivial_players(split, run)["skill"] for run in of_arm]
                    known = [each[MATERIAL] for each in players if each]  # none, where a run moves nowhere legally
                    row[MATERIAL] = float(np.mean(known)) if known else None
                yield row


def differences(
    runs: Runs, pairs: Sequence[tuple[str, str]], groups: Mapping[str, Sequence[str]] | None = None, group: str = ""
) -> Iterator[dict[str, Any]]:
    """What one arm of each pair has more than the other, by metric; of a group's items alone where one is named."""
    first = runs[BASE][0]
    for task, mode in first.terms:
        metrics, keys = store.metrics_of(task), first.keys[task]
        inside = np.array([groups is None or group in groups[key] for key in keys])
        if not inside.any():
            continue
        games = [game for game, chosen in zip(first.games[task], inside, strict=True) if chosen]
        for arm, against in pairs:
            one, other = (side(runs, name, task, mode, inside) for name in (arm, against))
            for metric, found in zip(metrics, estimates(one, games, other), strict=True):
                if not np.isnan(found.value):  # a metric of which these items have none
                    row = {"task": task, "mode": mode, "metric": metric.name, "arm": arm, "against": against}
                    row |= {"difference": found.value, **bounds(found), "p_value": found.p_value}
                    yield row | ({"items": len(games)} if group else {})


def bounds(found: Estimate) -> dict[str, Any]:
    low, high = found.interval
    return {"ci_low": low, "ci_high": high, **({"lacks": found.lacks} if found.lacks else {})}


def below(row: Mapping[str, Any]) -> bool:
    """Whether a row's whole interval is; over too few games, or of one seed, there is none."""
    return row["ci_high"] is not None and row["ci_high"] < 0


def above(row: Mapping[str, Any]) -> bool:
    return row["ci_low"] is not None and row["ci_low"] > 0


def groups_of(split: str) -> dict[str, tuple[str, ...]]:
    """By an item's key, the groups it is in: of a `P:` item colour, check or not, and stratum, of an `A:` item that."""
    found: dict[str, tuple[str, ...]] = {}
    for row in shipped(split):
        found[item_key(row)] = (row["stratum"],)
        if row["task"] == "policy":
            board = chess.Board(policy.parse_prompt(row["prompt"]))
            colour = "White to move" if board.turn else "Black to move"
            found[item_key(row)] = (colour, "in check" if board.is_check() else "not in check", row["stratum"])
    return found


def shown(row: Mapping[str, Any], sign: str = "") -> str:
    """A row's interval, behind a space, or why there is none."""
    return f" ({row['lacks']})" if "lacks" in row else f" [{row['ci_low']:{sign}.3f}, {row['ci_high']:{sign}.3f}]"


def arms_table(report: dict[str, Any]) -> str:
    """The three headlines of every arm, greedy, with wins (bold) and losses (italic) against the base by the rule, the
    median of its updates, and the skill of whoever takes most material on the items that the arm moves legally; and
    what trivial players reach on the base's."""
    greedy = [row for row in report["values"] if row["mode"] == "greedy" and row["metric"] in COMPARED]
    by_arm = {(row["arm"], row["metric"]): row for row in greedy}
    marks = {
        (pair["arm"], pair["metric"]): "**" if pair["difference"] > 0 else "*"
        for pair in report["pairs"]
        if pair["against"] == BASE and pair["win"]
    }
    names = [name for name in COMPARED if any(row["metric"] == name for row in greedy)]
    heads = [COMPARED[name] for name in names]
    lines = [f"| arm | seeds | updates | {' | '.join(heads)} | skill of {MATERIAL}, same items |"]
    lines += ["|---|---:|---:|" + "---|" * len(names) + "---:|"]
    for arm in dict.fromkeys(arm for arm, _ in by_arm):
        cells = []
        for name in names:
            row, mark = by_arm[arm, name], marks.get((arm, name), "")
            cells.append(f"{mark}{row['mean']:.3f}{mark}{shown(row)}")
        material = by_arm[arm, "skill"][MATERIAL]
        cells.append("" if material is None else f"{material:.3f}")
        made = statistics.median(report["updates"][arm])
        lines.append(f"| {arm} | {len(report['updates'][arm])} | {made:g} | " + " | ".join(cells) + " |")
    for player in dict.fromkeys(player for of_metric in report["trivial players"].values() for player in of_metric):
        reached = [report["trivial players"].get(name, {}).get(player) for name in names]
        cells = ["" if value is None else f"{value:.3f}" for value in reached]
        lines.append(" | ".join([f"| ({player})", "", "", *cells, "", ""]).replace("  ", " ").rstrip())
    return "\n".join(lines)


def changes_table(report: dict[str, Any]) -> str:
    """Every metric, greedy and sampled, whose interval beside the base leaves out 0: gains and losses of each arm."""
    lines = ["| arm | significant gains | significant losses |", "|---|---|---|"]
    for arm in (arm for arm in report["minutes"] if arm != BASE):
        own = [row for row in report["changes"] if row["arm"] == arm]
        cells = []
        for side_of_0 in (above, below):
            texts = []
            for row in filter(side_of_0, own):
                mode = "" if row["mode"] == "greedy" else ", sampled"
                texts.append(f"{row['metric']}{mode} {row['difference']:+.3f}{shown(row, '+')}")
            cells.append("; ".join(texts) or "none")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs_table(report: dict[str, Any]) -> str:
    """What `ours` has more than each other arm, greedy, with what the rule decides (bold)."""
    own = [pair for pair in report["pairs"] if report["ours"] in (pair["arm"], pair["against"])]
    names = [name for name in COMPARED if any(row["metric"] == name for row in own)]
    lines = [
        f"| {report['ours']} less | {' | '.join(COMPARED[name] for name in names)} |",
        "|---|" + "---|" * len(names),
    ]
    for arm in dict.fromkeys(pair["against"] for pair in own):
        cells = []
        for name in names:
            (row,) = (row for row in own if (row["against"], row["metric"]) == (arm, name))
            mark = "**" if row["win"] else ""
            cells.append(f"{mark}{row['difference']:+.3f}{mark}{shown(row, '+')}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def as_markdown(report: dict[str, Any]) -> str:
    tables = [arms_table(report), changes_table(report)]
    if report["ours"] in report["minutes"]:
        tables.insert(1, pairs_table(report))
    return "\n\n".join(tables)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The figure: every arm's headlines with their intervals, beside the base's."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # else every run of this writes another file
    from matplotlib import pyplot

    rows = {(row["metric"], row["arm"]): row for row in report["values"] if row["mode"] == "greedy"}
    arms = [arm for arm in report["minutes"] if arm != BASE]
    shown = [metric for metric in COMPARED if (metric, BASE) in rows]
    size = (10, 1.1 + 0.28 * len(arms))
    figure, panels = pyplot.subplots(1, len(shown), figsize=size, layout="constrained", sharey=True)
    for panel, metric in zip(panels, shown, strict=True):
        panel.axvline(rows[metric, BASE]["mean"], color="#999999", linestyle=":", label="before training")
        for place, arm in enumerate(reversed(arms)):
            row = rows[metric, arm]
            color = "#1b7837" if arm == report["ours"] else "#444444"
            if row["ci_low"] is not None:
                panel.plot([row["ci_low"], row["ci_high"]], [place, place], color=color, linewidth=1.5)
            panel.plot(row["mean"], place, "o", color=color, markersize=5)
        panel.set(title=COMPARED[metric], yticks=range(len(arms)), yticklabels=arms[::-1])
        panel.grid(alpha=0.25, axis="x")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
