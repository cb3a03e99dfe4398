"""What the tables of the pages are made of: result files, numbers, and rows of Markdown."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


def read(name: str) -> Any:
    """A file of `benchmarks/results/`, without its `.json`."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], aligned: str, rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown.

    Args:
        aligned: of each column `l` or `r`.
    """
    rule = "|".join({"l": "---", "r": "---:"}[side] for side in aligned)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]).replace("|  |", "| |").replace("|  |", "| |")


def number(value: float, spec: str = ".3f") -> str:
    """With a sign that is no hyphen; no sign before what rounds to 0."""
    text = format(value, spec)
    return text.lstrip("+-") if float(text) == 0 else minus(text)


def minus(text: str) -> str:
    """The same with the sign of minus for a hyphen before a number."""
    return _MINUS.sub("−", text)


def interval(low: float, high: float, spec: str = ".3f") -> str:
    return f"[{number(low, spec)}, {number(high, spec)}]"


def change(row: Mapping[str, Any], spec: str = "+.3f", bounds: str = ".3f", scale: float = 1) -> str:
    """A difference with its interval, bold where that leaves out 0; over too few games there is none."""
    low, high = row["ci_low"], row["ci_high"]
    if low is None:
        return number(scale * row["difference"], spec)
    low, high = (0.0 if abs(bound) < 1e-12 else bound for bound in (low, high))
    mark = "**" if low > 0 or high < 0 else ""
    shown = interval(scale * low, scale * high, bounds)
    return f"{mark}{number(scale * row['difference'], spec)}{mark} {shown}"


def only(rows: Iterable[Mapping[str, Any]], **having: Any) -> Mapping[str, Any]:
    """The row that has these values.

    Raises:
        ValueError: none has, or several have.
    """
    (found,) = (row for row in rows if all(row.get(name, "") == value for name, value in having.items()))
    return found


def players(row: Mapping[str, Any], names: Iterable[str], percent: bool = False) -> str:
    """`random legal 0, most material 0.524`: what trivial players get over the items that the row counts; two numbers
    where those are others before and after. An older file has what they get on all items, and says so."""
    shown = []
    for name in names:
        values = [row[side][name] for side in ("baselines", "baselines_after") if name in row.get(side, {})]
        texts = [f"{100 * v:.1f} %" if percent else f"{v:.3f}" for v in values]
        zero = "0 %" if percent else "0"
        texts = [zero if value == 0 else text for text, value in zip(texts, values, strict=True)]
        shown.append(f"{name} {' → '.join(dict.fromkeys(texts))}")
    older = row["metric"] == "skill" and "baselines_after" not in row
    return ("on all items " if older else "") + ", ".join(shown)
