"""Before against after on the same items: paired differences with intervals."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

import numpy as np

from rookworld_trl.measuring.intervals import (
    bootstrap_ratios,
    clusters_behind,
    percentile_interval,
    ratios,
    sums_by_cluster,
    wilson,
)
from rookworld_trl.measuring.metrics import terms
from rookworld_trl.measuring.result import Result


class Comparison(TypedDict):
    """One metric, before and after, over the same items.

    A row explains itself, so that reports need nothing but the file it is written to: `label`, `headline` and `format`
    ("percent", or a format spec) say how to show it, `baselines` and `baselines_after` what trivial players get on the
    items that `before` and `after` are counted over: skill is over legal moves, which are others before and after.

    `ci_low` and `ci_high` bound the difference (95 %, percentile bootstrap over items, or over games where items share
    one); `significant` says that they leave out 0, `loss` that they do so on the worse side; `better` is 1 or -1, or 0
    for what is neither gain nor loss.
    Values are None where undefined (no positives).

    `clusters` says how many games (items, where none share one) the value rests on, the fewer of before and after.
    Below `MIN_CLUSTERS` there is no verdict: bounds are None, nothing is significant and nothing a loss.
    """

    task: str  # or a suite's name
    prefix: str
    mode: str
    metric: str
    label: str
    headline: bool
    format: str
    before: float | None
    after: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    items: int
    clusters: int
    significant: bool
    better: int
    loss: bool
    baselines: dict[str, float]
    baselines_after: dict[str, float]


def compare(
    before: Sequence[Result], after: Sequence[Result], seed: int = 0, only: Container[str] | None = None
) -> list[Comparison]:
    """Compare results of the same names and modes metric by metric, pairing item by item.

    Args:
        only: names of metrics; None for all.

    Raises:
        ValueError: two differ in their items or settings (their seeds may differ), or one has no other.
    """
    rows: list[Comparison] = []
    for then, now in _pairs(before, after):
        metrics = [metric for metric in now.metrics if only is None or metric.name in only]
        k, games = len(metrics), [item.game for item in now.items]
        try:
            sides = [terms([item.scores for item in each.items], metrics) for each in (then, now)]
        except KeyError as error:
            raise ValueError(f"the earlier '{now.name}' lacks {error}; measure it again") from error
        top, bottom = (np.hstack(arrays) for arrays in zip(*sides, strict=True))
        values = ratios(top, bottom)
        top, bottom = sums_by_cluster(top, games), sums_by_cluster(bottom, games)
        draws, clusters = bootstrap_ratios(top, bottom, seed=seed), clusters_behind(bottom)
        heads, trivial = {metric.name for metric in now.heads}, [each.baselines() for each in (then, now)]
        for i, metric in enumerate(metrics):
            name, old, new = metric.name, float(values[i]), float(values[k + i])
            n = int(min(clusters[i], clusters[k + i]))
            # Rounded, for equal sums of two columns may differ in their last digit, and 1e-17 is no gain.
            low, high = percentile_interval(np.round(draws[:, k + i] - draws[:, i], 12), n)
            if low == high and low is not None and metric.at_most_1 and new - old in (-1, 0, 1):
                # Every cluster changed alike, and resampling has no width: by Wilson, so many of them may do otherwise.
                otherwise = wilson(0, n)[1]
                low, high = max(new - old - otherwise, -1.0), min(new - old + otherwise, 1.0)
            row: Any = {"task": now.name, "prefix": now.prefix, "mode": now.mode, "metric": name, "label": metric.label}
            row |= {"headline": name in heads, "format": metric.format, "items": len(games), "clusters": n}
            row |= {"baselines": trivial[0].get(name, {}), "baselines_after": trivial[1].get(name, {})}
            row |= judged((old, new, new - old), (low, high), metric.better)
            rows.append(cast(Comparison, row))
    return rows


def against(
    after: Sequence[Result], earlier: Mapping[tuple[str, str], Mapping[str, Any]]
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Everything compared with an earlier result's file (`read_results`), and the headlines by group.

    Raises:
        ValueError: the file lacks a result, or has it of other items or settings.
    """
    rows: list[Comparison] = []
    groups: list[dict[str, Any]] = []
    for now in after:
        if (now.name, now.mode) not in earlier:
            raise ValueError(
                f"the baseline has no '{now.name}', {now.mode}; measure it with the same suites and --mode"
            )
        try:
            then = now.earlier(earlier[now.name, now.mode])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the baseline's '{now.name}' is none that this version wrote: {error}") from error
        rows += [*now.further(then), *compare([then], [now])]
        groups += compare_groups([then], [now])
    return rows, groups


def compare_groups(before: Sequence[Result], after: Sequence[Result]) -> list[dict[str, Any]]:
    """`compare` of the headlines within each group, each row with its `group`, such as `color=white`.

    Groups that are an outcome, so that an item may change them, are left out.
    """
    rows: list[dict[str, Any]] = []
    for then, now in _pairs(before, after):
        if [item.groups for item in then.items] == [item.groups for item in now.items]:
            for kind, value in now.groups():
                old, new = ([each.select(**{kind: value})] for each in (then, now))
                found = compare(old, new, only=[metric.name for metric in now.heads])
                rows += [{"group": f"{kind}={value}", **row} for row in found]
    return rows


def losses(rows: Sequence[Mapping[str, Any]], of_what: str) -> tuple[list[Mapping[str, Any]], str]:
    """The rows that are significant losses, and how many of how many that is, in words: "none among 50 metrics".

    Rows without an interval, for too few games bear on them, are counted apart. The words are empty where nothing was
    compared.
    """
    known = [row for row in rows if row["better"] and row["difference"] is not None]
    judged = [row for row in known if row["ci_low"] is not None]
    lost = [row for row in judged if row["loss"]]
    words = f"{len(lost) or 'none'} {'of' if lost else 'among'} {len(judged)} {of_what}"
    words += f", and no verdict on {len(known) - len(judged)}" if len(judged) < len(known) else ""
    return lost, words if known else ""


def _pairs(before: Sequence[Result], after: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    """Each result with the earlier one of its name and mode, their items in one order."""
    earlier = {(each.name, each.mode): each for each in before}
    for now in after:
        if (then := earlier.get((now.name, now.mode))) is None:
            raise ValueError(f"'{now.name}', {now.mode}, was not measured before; measure the same, in the same modes")
        settings = [(name, *(e.settings.get(name) for e in (then, now))) for name in {*then.settings, *now.settings}]
        for name, old, new in settings:
            if old != new and name != "seed":
                raise ValueError(
                    f"the two results of '{now.name}' differ in {name} ({old} and {new}); measure with equal settings"
                )
        names = [[item.name for item in each.items] for each in (then, now)]
        if sorted(names[0]) != sorted(names[1]):
            missing, extra = len({*names[0]} - {*names[1]}), len({*names[1]} - {*names[0]})
            raise ValueError(
                f"the two results of '{now.name}' are not of the same items ({missing} only before, {extra} only "
                "after, or some more than once), so nothing can be paired; measure both on the same ones"
            )
        old, new = (sorted(range(len(each)), key=each.__getitem__) for each in names)
        place = dict(zip(old, new, strict=True))
        yield then, replace(now, items=[now.items[place[number]] for number in range(len(place))])


def judged(
    values: tuple[float, float, float], bounds: tuple[float | None, float | None], better: int
) -> dict[str, Any]:
    """Before, after and the difference, NaN where undefined, with the verdict: significant where the difference's
    interval leaves out 0, and a loss on the worse side of it."""
    low, high = bounds
    up, down = low is not None and low > 0, high is not None and high < 0
    found = zip(("before", "after", "difference"), (None if np.isnan(each) else each for each in values), strict=True)
    row = dict(found) | {"ci_low": low, "ci_high": high, "significant": up or down, "better": better}
    return row | {"loss": down if better > 0 else up and better < 0}
