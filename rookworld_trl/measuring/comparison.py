"""Before against after on the same items: paired differences with intervals."""

import dataclasses
from collections.abc import Container, Sequence
from typing import Any, TypedDict, cast

import numpy as np

from rookworld_trl.chess.accuracy import Evaluation
from rookworld_trl.chess.suite import SuiteItem, SuiteResult
from rookworld_trl.chess.trivial import Baselines
from rookworld_trl.measuring.intervals import (
    MIN_CLUSTERS,
    bootstrap_ratios,
    clusters_behind,
    mcnemar_exact,
    percentile_interval,
    ratios,
    sums_by_cluster,
    wilson,
)
from rookworld_trl.measuring.metrics import HEADLINES, METRICS, Metric, Scores, shared, terms


class Comparison(TypedDict):
    """One metric, before and after, over the same items.

    A row explains itself, so that reports need nothing but the file it is written to: `label`, `headline` and `format`
    ("percent", or a format spec) say how to show it, `baselines` and `baselines_after` what trivial players get on the
    items that `before` and `after` are counted over: skill is over legal moves, which are others before and after.

    `ci_low` and `ci_high` bound the difference (95 %, percentile bootstrap over items, or over games where items share
    one); `significant` says that they leave out 0, `loss` that they do so on the worse side; `better` is 1 or -1, or 0
    for what is neither gain nor loss. `p_value` is McNemar's exact test, for proportions over all items, else None.
    Values are None where undefined (no positives).

    `clusters` says how many games (items, where none share one) the value rests on, the fewer of before and after.
    Below `MIN_CLUSTERS` there is no verdict: bounds and p-value are None, nothing is significant and nothing a loss.
    """

    task: str  # or a suite's name
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
    p_value: float | None
    items: int
    clusters: int
    significant: bool
    better: int
    loss: bool
    baselines: dict[str, float]
    baselines_after: dict[str, float]


def compare(
    before: Evaluation, after: Evaluation, seed: int = 0, only: Container[str] | None = None
) -> list[Comparison]:
    """Compare two evaluations metric by metric, pairing item by item.

    Args:
        only: names of metrics; None for all.

    Raises:
        ValueError: the two differ in their items, modes, temperature or max_new_tokens. (Their seeds may differ.)
    """
    after = _paired(before, after)
    rows: list[Comparison] = []
    for task, mode in before.tasks_and_modes():
        metrics = [metric for metric in METRICS[task] if only is None or metric.name in only]
        items = before.select(task, mode)
        old, new = ([item.scores for item in run.select(task, mode)] for run in (before, after))
        found = _paired_rows(metrics, old, new, [item.game for item in items], seed)
        trivial = [run.baselines(task, mode) for run in (before, after)]
        rows += [_named(row, task, mode, HEADLINES[task], *trivial) for row in found]
    return rows


def compare_suites(before: dict[str, Any], after: SuiteResult, mode: str, seed: int = 0) -> list[Comparison]:
    """Compare a suite's result with an earlier one of the same items, as `SuiteResult.to_dict` wrote it.

    Raises:
        ValueError: it is of other items, or was made with other settings (another seed may be), or a metric's numbers
            are missing.
    """
    try:
        settings, items = before["settings"], [SuiteItem(**item) for item in before["items"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the baseline's suite '{after.name}' is none that recipes/evaluate.py wrote: {error}"
        ) from error
    unlike = {k for k in {*settings, *after.settings} - {"seed"} if settings.get(k) != after.settings.get(k)}
    if unlike:
        raise ValueError(f"suite '{after.name}' differs from the baseline's in {', '.join(sorted(unlike))}")
    old = {item.name: item for item in items}
    if len(old) < len(items) or sorted(old) != sorted(item.name for item in after.items):
        raise ValueError(f"suite '{after.name}' is not of the baseline's items; measure both on the same ones")
    pairs = [(old[item.name].scores, item.scores) for item in after.items]
    try:
        games = [item.game for item in after.items]
        found = _paired_rows(after.metrics, [a for a, _ in pairs], [b for _, b in pairs], games, seed)
    except KeyError as error:
        raise ValueError(f"the baseline's suite '{after.name}' lacks {error}; measure it again") from error
    trivial = after.baselines()  # of all items, before and after
    return [_named(row, after.name, mode, (after.metrics[0].name,), trivial, trivial) for row in found]


def _paired_rows(
    metrics: Sequence[Metric],
    before: Sequence[Scores],
    after: Sequence[Scores],
    games: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row a metric, without what `_named` adds."""
    k = len(metrics)
    tops, bottoms = zip(*(terms(scores, metrics) for scores in (before, after)), strict=True)
    top, bottom = np.hstack(tops), np.hstack(bottoms)
    values, by_game = ratios(top, bottom), shared(games)
    if by_game:
        top, bottom = sums_by_cluster(top, games), sums_by_cluster(bottom, games)
    draws, clusters = bootstrap_ratios(top, bottom, seed=seed), clusters_behind(bottom)
    rows: list[dict[str, Any]] = []
    for i, metric in enumerate(metrics):
        old, new = float(values[i]), float(values[k + i])
        defined = not (np.isnan(old) or np.isnan(new))
        n = int(min(clusters[i], clusters[k + i]))
        # Rounded, for equal sums of two columns may differ in their last digit, and 1e-17 is no gain.
        changes = np.round(draws[:, k + i] - draws[:, i], 12)
        low, high = percentile_interval(changes, n) if defined else (None, None)
        if low == high and low is not None and metric.at_most_1 and new - old in (-1, 0, 1):
            # Every cluster changed alike, and resampling has no width: by Wilson, so many of them may do otherwise.
            otherwise = wilson(0, n)[1]
            low, high = max(new - old - otherwise, -1.0), min(new - old + otherwise, 1.0)
        up, down = low is not None and low > 0, high is not None and high < 0
        p_value = None
        every_item = metric.proportion and not by_game and all((of_run[:, i] == 1).all() for of_run in bottoms)
        if every_item and n >= MIN_CLUSTERS:
            change = tops[1][:, i] - tops[0][:, i]
            p_value = mcnemar_exact(int((change > 0).sum()), int((change < 0).sum()))
        rows.append(
            {
                "metric": metric.name,
                "label": metric.label,
                "format": metric.format,
                "before": None if np.isnan(old) else old,
                "after": None if np.isnan(new) else new,
                "difference": new - old if defined else None,
                "ci_low": low,
                "ci_high": high,
                "p_value": p_value,
                "items": len(before),
                "clusters": n,
                "significant": up or down,
                "better": metric.better,
                "loss": (down and metric.better > 0) or (up and metric.better < 0),
            }
        )
    return rows


def _named(
    row: dict[str, Any], task: str, mode: str, headlines: Container[str], before: Baselines, after: Baselines
) -> Comparison:
    """A row with its place: whose it is, whether it is a headline, and what trivial players get."""
    metric = row["metric"]
    place = {"task": task, "mode": mode, "headline": metric in headlines}
    players = {"baselines": before.get(metric, {}), "baselines_after": after.get(metric, {})}
    return cast(Comparison, {**place, **players, **row})


def compare_groups(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """`compare` of the headline metrics within each colour, stake and stratum, each row with its `group`."""
    rows: list[dict[str, Any]] = []
    for task, headlines in HEADLINES.items():
        for name, value in before.groups(task):
            then, now = (
                dataclasses.replace(
                    run, items=[item for item in run.items if item.task == task and getattr(item, name) == value]
                )
                for run in (before, after)
            )
            rows += [{"group": f"{name}={value}", **row} for row in compare(then, now, only=headlines)]
    return rows


def _paired(before: Evaluation, after: Evaluation) -> Evaluation:
    """`after` with its items in the order of `before`."""
    for name in ("temperature", "max_new_tokens", "task_sampling"):
        if before.settings.get(name) != after.settings.get(name):
            raise ValueError(
                f"the two evaluations differ in {name} ({before.settings.get(name)} and {after.settings.get(name)}); "
                "evaluate both with the same settings"
            )
    old, new = ([(item.mode, item.key) for item in run.items] for run in (before, after))
    if sorted(old) != sorted(new):
        missing, extra = len(set(old) - set(new)), len(set(new) - set(old))
        raise ValueError(
            f"the two evaluations are not of the same items ({missing} only before, {extra} only after, or some more "
            "than once), so nothing can be paired; evaluate both on the same data set, limit and modes"
        )
    order = sorted(range(len(old)), key=old.__getitem__)
    place = dict(zip(order, sorted(range(len(new)), key=new.__getitem__), strict=True))
    return dataclasses.replace(after, items=[after.items[place[number]] for number in range(len(old))])
