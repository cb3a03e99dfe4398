"""All that was measured of one model: its JSON, its comparison with a baseline, models side by side in one table."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rookworld_trl.chess import PREFIXES
from rookworld_trl.chess.accuracy import Evaluation
from rookworld_trl.chess.elo_changes import elo_changes
from rookworld_trl.chess.ladder import RULES, Ladder
from rookworld_trl.chess.suite import SuiteResult
from rookworld_trl.measuring.comparison import Comparison, compare, compare_groups, compare_suites
from rookworld_trl.measuring.metrics import HEADLINES, METRICS, Estimate
from rookworld_trl.measuring.tables import number, too_few
from rookworld_trl.modeling.loading import NANO

HELD_OUT = "held-out"


def data_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the rows, which says whether two evaluations saw the same data."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def names_of(models: Sequence[str]) -> list[str]:
    """Short names of the models as given, for tables and games: the last part of a path where that tells them apart."""
    short = ["rookworld-nano" if name == NANO else Path(name).name for name in models]
    named = [one if short.count(one) == 1 else name for one, name in zip(short, models, strict=True)]
    return [name if named.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(named, 1)]


@dataclass(frozen=True, slots=True)
class Headline:
    """A suite's main number of one model.

    Attributes:
        players: what trivial players get over the items that the number is counted over.
    """

    suite: str
    label: str
    mode: str
    format: str
    estimate: Estimate
    players: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class ModelResults:
    """Everything measured of a model.

    Attributes:
        facts: what else is to be written: its name, its revision.
        suites: each with its decoding mode.
    """

    name: str
    facts: dict[str, Any]
    held_out: Evaluation | None = None
    suites: list[tuple[str, SuiteResult | Ladder]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        suites = [{"mode": mode, **result.to_dict()} for mode, result in self.suites]
        held_out = {"held_out": self.held_out.to_dict()} if self.held_out else {}
        return {"name": self.name, **self.facts, **held_out, "suites": suites}

    def headlines(self) -> list[Headline]:
        """The main numbers of all suites."""
        found = []
        if self.held_out:
            for task, mode in self.held_out.tasks_and_modes():
                estimates, trivial = self.held_out.estimates(task, mode), self.held_out.baselines(task, mode)
                for metric in (metric for metric in METRICS[task] if metric.name in HEADLINES[task]):
                    players = trivial.get(metric.name, {})
                    suite = f"{HELD_OUT} {PREFIXES[task].strip()}"
                    found.append(Headline(suite, metric.label, mode, metric.format, estimates[metric.name], players))
        for mode, result in self.suites:
            if isinstance(result, Ladder):
                found += _of_ladder(result, mode)
            else:
                head = result.metrics[0]
                players = result.baselines().get(head.name, {})
                found.append(
                    Headline(result.name, head.label, mode, head.format, result.estimates()[head.name], players)
                )
        return found

    def against(self, baseline: "Baseline") -> tuple[list[Comparison], list[dict[str, Any]]]:
        """Everything compared with an earlier result, and the held-out headlines by group.

        Raises:
            ValueError: the baseline lacks a suite, or has it of other items or settings.
        """
        rows: list[Comparison] = []
        groups: list[dict[str, Any]] = []
        if self.held_out:
            before = baseline.held_out_items()
            rows += compare(before, self.held_out)
            groups = compare_groups(before, self.held_out)
        for mode, result in self.suites:
            before_suite = baseline.suite(result.name, mode)
            if isinstance(result, Ladder):
                rows += elo_changes(before_suite, result, mode)
                result = result.points()
            rows += compare_suites(before_suite, result, mode)
        return rows, groups


def _of_ladder(ladder: Ladder, mode: str) -> list[Headline]:
    points = ladder.points().estimates()
    found = [Headline(ladder.name, f"points, {rules} rules", mode, "percent", points[rules]) for rules in RULES]
    for rules in RULES:
        rating = ladder.ratings(rules)[ladder.model]
        value = Estimate(
            value=rating.elo,
            ci_low=rating.ci_low,
            ci_high=rating.ci_high,
            clusters=rating.games,
            numerator=rating.points,
            denominator=float(rating.games),
        )
        label = f"Elo, {rules} rules ({ladder.anchor} = {ladder.anchor_elo:.0f})"
        others = {
            name: other.elo for name, other in ladder.ratings(rules).items() if name in ("random", "greedy capture")
        }
        found.append(Headline(ladder.name, label, mode, ".0f", value, others))
    return found


@dataclass(frozen=True, slots=True)
class Baseline:
    """An earlier result: of recipes/evaluate.py (its first model), or an evaluation that recipes/grpo.py wrote."""

    content: Mapping[str, Any]

    def held_out_items(self) -> Evaluation:
        """Its held-out items.

        Raises:
            ValueError: it has none.
        """
        found = self.content if "items" in self.content else self.content.get("held_out")
        if found is None:
            raise ValueError("the baseline has no held-out items; measure it with `--suite held_out` too")
        return Evaluation.from_dict(found)

    def suite(self, name: str, mode: str) -> dict[str, Any]:
        """A suite's result.

        Raises:
            ValueError: it was not measured.
        """
        for suite in self.content.get("suites", ()):
            if (suite.get("suite"), suite.get("mode")) == (name, mode):
                return suite
        raise ValueError(f"the baseline has no suite '{name}', {mode}; measure it with the same suites and --mode")

    def check(self, held_out: bool, suites: Sequence[tuple[str, str]]) -> None:
        """Make sure before anything is measured that it has what will be compared.

        Raises:
            ValueError: naming what is missing.
        """
        if held_out:
            self.held_out_items()
        for name, mode in suites:
            self.suite(name, mode)


def read_baseline(path: Path) -> Baseline:
    """An earlier result's file.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content["models"][0] if "models" in content else content
        if "items" not in content and "suites" not in content:
            raise ValueError("it holds no evaluation, neither 'items' nor 'models'")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: no evaluation written by recipes/evaluate.py or recipes/grpo.py: {error}") from error
    return Baseline(content)


def overview(models: Sequence[ModelResults]) -> str:
    """The headlines of all models side by side, and trivial players', as a Markdown table."""
    lines = [
        f"| suite | metric | decoding | {' | '.join(model.name for model in models)} | trivial players |",
        f"|---|---|---|{'---:|' * len(models)}---|",
    ]
    for row in zip(*(model.headlines() for model in models), strict=True):
        first = row[0]
        cells = " | ".join(_value(each) for each in row)
        lines.append(f"| {first.suite} | {first.label} | {first.mode} | {cells} | {_players(row)} |")
    return "\n".join(lines)


def _players(row: Sequence[Headline]) -> str:
    """What trivial players get: one number each, or where it differs, since skill is over the items that a model moves
    legally, one for each model."""
    shown = []
    for name in dict.fromkeys(name for each in row for name in each.players):
        values = [number(each.players.get(name), each.format) for each in row]
        shown.append(f"{name} {' / '.join(values if len(set(values)) > 1 else values[:1])}")
    return ", ".join(shown)


def _value(headline: Headline) -> str:
    """A value with its interval; where one side is open, the other one alone."""
    found, show = headline.estimate, number
    if found["value"] is None:
        return "n/a"
    low, high = found["ci_low"], found["ci_high"]
    if low is None and high is None:
        return f"{show(found['value'], headline.format)}, {too_few(found['clusters'])}"
    if low is None or high is None:
        return f"< {show(high, headline.format)}" if low is None else f"> {show(low, headline.format)}"
    value = show(found["value"], headline.format)
    return f"{value} [{show(low, headline.format)}, {show(high, headline.format)}]"
