"""The table of README.md: what the demo gains and loses (`demo.json`)."""

from collections.abc import Mapping
from typing import Any

from tests.support.tables.cells import interval, number, only, players, read, table

ROWS = {  # label, and the trivial players beside it
    ("policy", "best_legal"): ("`P:` the chosen move is legal", ()),
    ("policy", "skill"): ("`P:` skill", ("random legal", "first legal", "most material")),
    ("policy", "best_in_top5"): ("`P:` in the engine's top five", ("random legal", "most material")),
    ("policy", "candidates_legal_distinct"): ("`P:` five legal and distinct candidates", ()),
    ("environment", "exact"): ("`A:` exact answer", ("input copied",)),
}
LOSSES = {"truncated_recall": "`A:` illegal moves recognised, recall", "terminated_precision": "`A:` ends, precision"}
PRECISION = {"truncated_recall": "truncated_precision"}  # a recall says little without it


def shown(row: Mapping[str, Any], name: str = "before") -> str:
    return number(row[name]) if row["format"] == ".3f" else f"{100 * row[name]:.1f} %"


def change(row: Mapping[str, Any]) -> str:
    scale, spec = (1, "+.3f") if row["format"] == ".3f" else (100, "+.1f")
    bounds = interval(scale * row["ci_low"], scale * row["ci_high"], spec)
    return f"{number(scale * row['difference'], spec)} {bounds}"


def demo() -> str:
    metrics = read("demo")["metrics"]
    rows = []
    for (task, metric), (label, beside) in ROWS.items():
        greedy, sampled = (only(metrics, task=task, metric=metric, mode=mode) for mode in ("greedy", "sampled"))
        if beside:
            label += f" ({players(greedy, beside, greedy['format'] == 'percent')})"
        for row, name in ((greedy, label), (sampled, "")):
            rows.append((name, row["mode"], shown(row), shown(row, "after"), change(row)))
    judged = [row for row in metrics if row["better"] and row["difference"] is not None]
    losses = [row for row in judged if row["loss"]]
    rows.append((f"**significant losses** ({len(losses)} of {len(judged)} metrics)", "", "", "", ""))
    for row in losses:
        label = LOSSES[row["metric"]]
        if row["metric"] in PRECISION:
            beside = only(metrics, task=row["task"], metric=PRECISION[row["metric"]], mode=row["mode"])
            label += f" (precision {100 * beside['before']:.1f} to {100 * beside['after']:.1f} %)"
        rows.append((label, row["mode"], shown(row), shown(row, "after"), change(row)))
    return table(("metric", "decoding", "before", "after", "change, 95 % interval"), "llrrl", rows)


TABLES = {"demo": demo}
