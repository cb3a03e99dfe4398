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
PRECISION = {"truncated_recall": "truncated_precision"}  # a recall says little without it


def shown(row: Mapping[str, Any], name: str = "before") -> str:
    return number(row[name]) if row["format"] == ".3f" else f"{100 * row[name]:.1f} %"


def change(row: Mapping[str, Any]) -> str:
    scale, spec = (1, "+.3f") if row["format"] == ".3f" else (100, "+.1f")
    bounds = interval(scale * row["ci_low"], scale * row["ci_high"], spec)
    return f"{number(scale * row['difference'], spec)} {bounds}"


def rows_of(metrics: list[dict[str, Any]], wanted: Mapping[tuple[str, str], Any]) -> list[tuple[str, ...]]:
    rows = []
    for (task, metric), (label, beside) in wanted.items():
        greedy, sampled = (only(metrics, task=task, metric=metric, mode=mode) for mode in ("greedy", "sampled"))
        if beside:
            label += f" ({players(greedy, beside, greedy['format'] == 'percent')})"
        for row, name in ((greedy, label), (sampled, "")):
            rows.append((name, row["mode"], shown(row), shown(row, "after"), change(row)))
    return rows


def lost(row: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """A loss by its name, with the precision beside a recall."""
    label = f"`{row['prefix']}` {row['label']}"
    if row["metric"] in PRECISION:
        beside = only(metrics, task=row["task"], metric=PRECISION[row["metric"]], mode=row["mode"])
        label += f" (precision {100 * beside['before']:.1f} to {100 * beside['after']:.1f} %)"
    return label


def judged() -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """All metrics of the demo, its significant losses, and how many these are of how many."""
    metrics = read("demo")["metrics"]
    known = [row for row in metrics if row["better"] and row["difference"] is not None]
    losses = [row for row in known if row["loss"]]
    return metrics, losses, f"{len(losses)} of {len(known)} metrics"


HEAD = ("metric", "decoding", "before", "after", "change, 95 % interval")


def demo() -> str:
    """Legality, skill and exactness, and the losses in one line."""
    metrics, losses, count = judged()
    three = {key: ROWS[key] for key in (("policy", "best_legal"), ("policy", "skill"), ("environment", "exact"))}
    said = "; ".join(f"{lost(row, metrics)}, {row['mode']} {change(row)}" for row in losses)
    link = "[all rows](docs/results.md#the-demo)"
    body = table(HEAD, "llrrl", rows_of(metrics, three))
    return f"{body}\n\nSignificant losses, {count}: {said or 'none'} ({link})."


def demo_whole() -> str:
    metrics, losses, count = judged()
    rows = [*rows_of(metrics, ROWS), (f"**significant losses** ({count})", "", "", "", "")]
    rows += [(lost(row, metrics), row["mode"], shown(row), shown(row, "after"), change(row)) for row in losses]
    return table(HEAD, "llrrl", rows)


TABLES = {"demo": demo}
