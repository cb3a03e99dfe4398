"""The three headlines by colour, check and stratum: where the gain is, and where there is none.

    python -m benchmarks.evidence.groups --split test --minutes 3 --arms exact sampled gold raft soft

Reads the runs that `benchmarks.evidence run` has stored. Differences from the base are paired, with intervals over
seeds and games; they decide nothing (`RULE.md` counts whole splits), and nothing is corrected for how many there are.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import chess
import numpy as np

from benchmarks.common import shipped, write_report
from benchmarks.evidence import store
from benchmarks.evidence.__main__ import BASE, COMPARED, interval, shown
from benchmarks.evidence.statistics import clusters, draws
from rookworld_trl.chess import policy
from rookworld_trl.chess.accuracy import item_key
from rookworld_trl.measuring.intervals import ratios

COLOURS = {chess.WHITE: "White to move", chess.BLACK: "Black to move"}
CHECK = {True: "in check", False: "not in check"}


def groups_of(split: str) -> dict[str, tuple[str, ...]]:
    """By an item's key, the groups it is in: of a `P:` item colour, check or not, and stratum, of an `A:` item that."""
    found: dict[str, tuple[str, ...]] = {}
    for row in shipped(split):
        found[item_key(row)] = (row["stratum"],)
        if row["task"] == "policy":
            board = chess.Board(policy.parse_prompt(row["prompt"]))
            found[item_key(row)] = (COLOURS[board.turn], CHECK[board.is_check()], row["stratum"])
    return found


def compare(runs: Mapping[str, Sequence[store.Result]], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Each arm's headlines in each group, greedy and sampled, and the differences from the base."""
    rows: list[dict[str, Any]] = []
    first = runs[BASE][0]
    for task, mode in first.terms:
        names = [metric.name for metric in store.metrics_of(task)]
        own = [groups[key] for key in first.keys[task]]
        for group in dict.fromkeys(name for of_item in own for name in of_item):
            inside = np.asarray([group in of_item for of_item in own])
            games = [game for game, chosen in zip(first.games[task], inside, strict=True) if chosen]
            sides = [
                [tuple(side[inside] for side in each.terms[task, mode]) for each in results]
                for results in runs.values()
            ]
            drawn, count = draws(sides, games), clusters(sides, games)
            for i, arm in enumerate(runs):
                for metric in (name for name in names if name in COMPARED):
                    column = names.index(metric)
                    value = float(np.mean([ratios(*side)[column] for side in sides[i]]))
                    row = {"task": task, "mode": mode, "group": group, "items": int(inside.sum()), "metric": metric}
                    row |= {"arm": arm, "seeds": len(sides[i]), "value": value}
                    if arm != BASE:
                        difference = drawn[:, i, column] - drawn[:, 0, column]
                        row |= {"difference": float(np.nanmean(difference)), **interval(difference, count[column])}
                    rows.append(row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]], mode: str = "greedy") -> str:
    own = [row for row in rows if row["mode"] == mode]
    arms = list(dict.fromkeys(row["arm"] for row in own))
    lines = ["| metric | group | items | " + " | ".join(arms) + " |", "|---|---|---:|" + "---|" * len(arms)]
    for metric, group, items in dict.fromkeys((row["metric"], row["group"], row["items"]) for row in own):
        cells = []
        for row in own:
            if (row["metric"], row["group"]) == (metric, group):
                change = "" if row["arm"] == BASE else f" {row['difference']:+.3f}"
                cells.append(f"{row['value']:.3f}{change}{shown(row, '+') if change else ''}")
        lines.append(f"| {metric} | {group} | {items} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--arms", nargs="+", default=["exact", "sampled", "gold", "raft"])
    arguments = parser.parse_args()
    split, middle = arguments.split, f"-{arguments.minutes:g}min-seed"
    runs = {BASE: [store.read(split, store.name_of(BASE, 0.0, 0))]}
    for arm in arguments.arms:
        runs[arm] = [store.read(split, name) for name in store.names(split) if name.startswith(arm + middle)]
        if not runs[arm]:
            what = f"{arm} of {arguments.minutes:g} minutes"
            raise SystemExit(f"{store.path_of(split)} holds no runs of {what}; `run` makes them")
    rows = compare(runs, groups_of(arguments.split))
    name = f"{arguments.split}-{arguments.minutes:g}min-groups.json"
    write_report(store.FOLDER / name, {"split": arguments.split, "minutes": arguments.minutes, "groups": rows})
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
