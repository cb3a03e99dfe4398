"""Before against after on the same items: paired differences with intervals."""

import dataclasses
from typing import Any, TypedDict

import numpy as np

from rookworld_trl.evaluation.accuracy import Evaluation
from rookworld_trl.evaluation.intervals import bootstrap_ratios, mcnemar_exact, percentile_interval, ratios
from rookworld_trl.evaluation.metrics import HEADLINES, METRICS, terms
from rookworld_trl.tasks import TaskName


class Comparison(TypedDict):
    """One metric, before and after, over the same items.

    A row explains itself, so that reports need nothing but the file it is written to: `label`, `headline` and `format`
    ("percent", or a format spec) say how to show it.

    `ci_low` and `ci_high` bound the difference (95 %, percentile bootstrap over items); `significant` says that they
    leave out 0. `p_value` is McNemar's exact test, for proportions over all items, else None. Values are None where
    undefined (no positives).
    """

    task: TaskName
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
    significant: bool


def compare(before: Evaluation, after: Evaluation, seed: int = 0) -> list[Comparison]:
    """Compare two evaluations metric by metric, pairing item by item.

    Raises:
        ValueError: the two differ in their items, modes, temperature or max_new_tokens. (Their seeds may differ.)
    """
    after = _paired(before, after)
    rows: list[Comparison] = []
    for task, mode in before.tasks_and_modes():
        metrics = METRICS[task]
        k = len(metrics)
        tops, bottoms = zip(
            *(terms([item.scores for item in run.select(task, mode)], metrics) for run in (before, after)), strict=True
        )
        values = ratios(np.hstack(tops), np.hstack(bottoms))
        draws = bootstrap_ratios(np.hstack(tops), np.hstack(bottoms), seed=seed)
        for i, metric in enumerate(metrics):
            old, new = float(values[i]), float(values[k + i])
            defined = not (np.isnan(old) or np.isnan(new))
            low, high = percentile_interval(draws[:, k + i] - draws[:, i])
            p_value = None
            if metric.proportion and all((bottom[:, i] == 1).all() for bottom in bottoms):
                change = tops[1][:, i] - tops[0][:, i]
                p_value = mcnemar_exact(int((change > 0).sum()), int((change < 0).sum()))
            rows.append(
                Comparison(
                    task=task,
                    mode=mode,
                    metric=metric.name,
                    label=metric.label,
                    headline=metric.name == HEADLINES[task],
                    format=metric.format,
                    before=None if np.isnan(old) else old,
                    after=None if np.isnan(new) else new,
                    difference=new - old if defined else None,
                    ci_low=low if defined else None,
                    ci_high=high if defined else None,
                    p_value=p_value,
                    items=len(tops[0]),
                    significant=defined and (low > 0 or high < 0),
                )
            )
    return rows


def compare_strata(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """`compare` within each stratum of positions, each row with its `stratum`; headline metrics and legality only."""
    rows: list[dict[str, Any]] = []
    for name in sorted({item.stratum for item in before.items}):
        then, now = (
            dataclasses.replace(run, items=[item for item in run.items if item.stratum == name])
            for run in (before, after)
        )
        found = compare(then, now)
        rows += [{"stratum": name, **row} for row in found if row["headline"] or row["metric"] == "best_legal"]
    return rows


def _paired(before: Evaluation, after: Evaluation) -> Evaluation:
    """`after` with its items in the order of `before`."""
    for name in ("temperature", "max_new_tokens"):
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
