"""What was measured of a model: on rows held out, problems or games, kept item by item.

Keeping the items is what makes a before/after comparison paired, and a doubtful number open to a look.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from rookworld_trl.files import write_atomically
from rookworld_trl.measuring.intervals import ratios
from rookworld_trl.measuring.metrics import Estimate, Metric, estimate, share, terms

Baselines = dict[str, dict[str, float]]  # by metric, by player as in tables
ITEM_TEXTS = ("name", "prompt", "completion", "game")


@dataclass(frozen=True, slots=True)
class Item:
    """One row's, problem's or game's result.

    Attributes:
        name: the same in every run; equal names make items of two results a pair.
        scores: numbers that the metrics are made of; those of trivial players as `player.score`.
        groups: what it is filed under, by kind, such as `{"color": "white"}`.
        game: what it was taken from; items of one game are resampled together. "" if not known.
        reference: what a report draws beside the completion.
    """

    name: str
    scores: dict[str, float]
    prompt: str = ""
    completion: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    game: str = ""
    reference: Any = None


class Headline(NamedTuple):
    """A main number, and what trivial players get over the items that it is counted over."""

    label: str
    format: str
    estimate: Estimate
    players: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """The results of all items of a task or suite, decoded in one way.

    Attributes:
        mode: how it was decoded, such as `greedy`.
        settings: what two results must share to be compared, and `seed`.
        headlines: names of the main metrics; none: the first one.
        players: trivial players on the same items, as in the scores and as in tables.
        prefix: what stands before the name and the labels in tables.
    """

    name: str
    metrics: Sequence[Metric] = field(compare=False)  # functions, which are equal to themselves alone
    items: list[Item]
    mode: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    headlines: tuple[str, ...] = ()
    players: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    @property
    def heads(self) -> list[Metric]:
        """The main metrics."""
        return [metric for metric in self.metrics if metric.name in self.headlines] or list(self.metrics[:1])

    @property
    def title(self) -> str:
        return f"{self.prefix} {self.name}".strip()

    def select(self, **having: str) -> Self:
        """The items of a group alone, such as `color="white"`."""
        return replace(self, items=[i for i in self.items if all(i.groups.get(k) == v for k, v in having.items())])

    def groups(self) -> dict[tuple[str, str], int]:
        """How many items each group has, by kind and value."""
        kinds = dict.fromkeys(kind for item in self.items for kind in item.groups)
        values = {kind: [item.groups.get(kind, "") for item in self.items] for kind in kinds}
        return {(kind, value): values[kind].count(value) for kind in kinds for value in sorted({*values[kind]} - {""})}

    def estimates(self, **having: str) -> dict[str, Estimate]:
        """Every metric with its 95 % interval, over all items or over a group.

        Raises:
            ValueError: no such items.
        """
        items = self.select(**having).items
        if not items:
            raise ValueError(f"'{self.name}' has no items {having or ''}".rstrip())
        return estimate([item.scores for item in items], self.metrics, [item.game for item in items])

    def baselines(self) -> Baselines:
        """What trivial players get on the same items, by metric and player, where a metric applies to them."""
        found: Baselines = {}
        for metric in self.metrics:
            for player, label in self.players.items():
                try:
                    own = [_as_player(player, metric, item.scores) for item in self.items]
                    value = float(ratios(*terms(own, [metric]))[0])
                except KeyError:
                    continue
                of_metric = found.setdefault(metric.name, {})
                if not math.isnan(value):
                    of_metric[label] = value
        return found

    def main_numbers(self) -> list[Headline]:
        """The headlines over all items."""
        found, players = self.estimates(), self.baselines()
        return [Headline(m.label, m.format, found[m.name], players.get(m.name, {})) for m in self.heads]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, estimates over all items and by group (`color=white`), trivial players, the items."""
        parts = {f"{kind}={value}": self.select(**{kind: value}) for kind, value in self.groups()}
        groups = {
            name: {"items": len(part.items), "metrics": part.estimates(), "baselines": part.baselines()}
            for name, part in parts.items()
        }
        about = {"name": self.name, "mode": self.mode, "prefix": self.prefix, "settings": self.settings}
        about |= {"metrics": self.estimates(), "baselines": self.baselines(), "groups": groups}
        return {**about, "items": [asdict(item) for item in self.items]}

    def earlier(self, data: Mapping[str, Any]) -> Self:
        """A result of the same metrics that `to_dict` told of."""
        return replace(self, settings=dict(data["settings"]), items=[Item(**item) for item in data["items"]])

    def further(self, before: "Result") -> list[Any]:
        """Rows of a comparison with an earlier result that are no metric of single items; none, but of a ladder."""
        return []


def scored(name: str, items: Sequence[str], **scores: Sequence[float]) -> Result:
    """A result of your own scores, each a list with one number for each item: a metric, and the first the headline."""
    columns = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
    found = [Item(item, row, prompt=item) for item, row in zip(items, columns, strict=True)]
    return Result(name, [share(each, each) for each in scores], found)


def of(results: Iterable[Result], name: str, mode: str = "greedy") -> Result:
    """The result of a name and mode.

    Raises:
        ValueError: there is none.
    """
    for each in results:
        if (each.name, each.mode) == (name, mode):
            return each
    raise ValueError(f"nothing was measured of '{name}', {mode}")


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write every item as a row of a Parquet file, which pandas opens, whole or not at all.

    Columns: `result`, `mode`, `name`, `prompt`, `completion`, `game`, `reference` (as JSON), and one for each kind of
    group (`group.color`) and each score (`score.tokens`), empty where an item has none. What else `to_dict` tells of
    the results stands in the file's metadata, under `results`.
    """
    told: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for each in results:
        about = each.to_dict()
        told.append(about | {"items": len(each.items)})
        for item in about["items"]:
            row = {"result": each.name, "mode": each.mode, "reference": json.dumps(item["reference"])}
            row |= {name: item[name] for name in ITEM_TEXTS}
            row |= {f"group.{kind}": value for kind, value in item["groups"].items()}
            rows.append(row | {f"score.{name}": value for name, value in item["scores"].items()})
    columns = dict.fromkeys(name for row in rows for name in row)
    types = {name: pa.float64() if name.startswith("score.") else pa.string() for name in columns}
    made = {name: pa.array([row.get(name) for row in rows], types[name]) for name in columns}
    table = pa.table(made).replace_schema_metadata({"results": json.dumps(told)})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_atomically(path, file.getvalue())


def read_results(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """What a file tells of each result, as `to_dict` does, by name and mode: one of `write_results`, or of
    recipes/evaluate.py, whose first model counts.

    Raises:
        ValueError: it is none, or an older version wrote it.
    """
    try:
        if path.suffix == ".parquet":
            results = _from_parquet(path)
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            results = content["models"][0]["results"]
        return {(each["name"], each["mode"]): each for each in results}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: no evaluation that this version wrote ({error}); measure again") from error


def _from_parquet(path: Path) -> list[dict[str, Any]]:
    table = pq.read_table(path)
    results: list[dict[str, Any]] = json.loads(table.schema.metadata[b"results"])
    items = []
    for row in table.to_pylist():
        item: dict[str, Any] = {"groups": {}, "scores": {}, "reference": json.loads(row["reference"])}
        for column, value in row.items():
            part, _, name = column.partition(".")
            if part in ("group", "score") and value is not None:
                item[f"{part}s"][name] = value
        items.append({name: row[name] for name in ITEM_TEXTS} | item)
    left = iter(items)
    for each in results:
        each["items"] = list(islice(left, each["items"]))
    return results


def _as_player(player: str, metric: Metric, scores: Mapping[str, float]) -> dict[str, float]:
    """An item's scores as if the player had answered."""
    start = f"{player}."
    own = {name.removeprefix(start): value for name, value in scores.items() if name.startswith(start)}
    return own | {name: scores[name] for name in metric.keeps}
