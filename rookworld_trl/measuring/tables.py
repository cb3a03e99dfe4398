"""Results and comparisons as text, at most 100 columns wide, and models side by side as Markdown."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rookworld_trl.measuring.comparison import Comparison, losses
from rookworld_trl.measuring.intervals import MIN_CLUSTERS
from rookworld_trl.measuring.metrics import Estimate, shared
from rookworld_trl.measuring.result import Result

_LABEL = 38
_TOO_FEW = f"too few (n): fewer than {MIN_CLUSTERS} games, openings, or items of no shared game bear on it: no interval"


def result_table(results: Sequence[Result]) -> str:
    """All metrics of each name, modes side by side; trivial players; the headlines by group."""
    lines: list[str] = []
    for name in dict.fromkeys(each.name for each in results):
        modes = [each for each in results if each.name == name]
        first = modes[0]
        heads = [f"{_mode(each):>8}{'95 % interval':>17}" for each in modes]
        lines += [_row(f"{first.title}, {len(first.items)} items", heads)]
        lines += ["-" * len(lines[-1])]
        estimates = [each.estimates() for each in modes]
        for metric in first.metrics:
            label = f"  {metric.label}{' *' if metric in first.heads else ''}"
            lines.append(_row(label, [_cell(found[metric.name], metric.format) for found in estimates]))
        trivial = [each.baselines() for each in modes]
        shown = [(m.label, _players([of.get(m.name, {}) for of in trivial], m.format, " / ")) for m in first.metrics]
        players = _player_lines(shown)
        lines += [*([""] if players else []), *players, *_group_lines(modes), ""]
        games = [item.game for item in first.items]
        intervals = "Wilson for shares, bootstrap for the rest"
        if shared(games):
            count = len({game or i for i, game in enumerate(games)})
            intervals = f"{'bootstrap' if count >= MIN_CLUSTERS else 'none'} over {count} games"
        settings = ", ".join(f"{key}={value}" for key, value in modes[-1].settings.items())
        text = "; ".join(filter(None, [settings, f"intervals: {intervals}"]))
        lines += [*textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  "), ""]
    return "\n".join([*lines, "* headline metrics. Shares in percent.", *few(lines)])


def comparison_table(
    rows: Sequence[Comparison], headlines_only: bool = False, groups: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Before -> after with the difference's paired interval; `+` and `-` mark a significant rise or fall.

    Below stand what trivial players get on the same items, and every significant loss among all the rows, also among
    those that `headlines_only` leaves out, and among the rows of `compare_groups`.
    """
    lines: list[str] = []
    shown = [row for row in rows if row["headline"] or not headlines_only]
    for task in dict.fromkeys(row["task"] for row in shown):
        of_task = [row for row in shown if row["task"] == task]
        for mode in dict.fromkeys(row["mode"] for row in of_task):
            of_mode = [row for row in of_task if row["mode"] == mode]
            head = ", ".join(filter(None, [f"{of_mode[0]['prefix']} {task}".strip(), mode]))
            head += f", {of_mode[0]['items']} items"
            lines += [f"{head:{_LABEL}}{'before':>9}{'after':>9}{'change':>9}   95 % interval", "-" * 86]
            lines += [*map(_comparison_line, of_mode), ""]
        found = _player_lines((f"{row['label']}, {row['mode']}", players_of(row)) for row in of_task)
        lines += [*found, ""] if found else []
    lines += _loss_lines(rows, "metrics")
    if groups:
        named = [{**row, "label": f"{row['group']}: {row['label']}"} for row in groups]
        lines += _loss_lines(named, "headline metrics by group")
    note = "* headline metrics; + or - marks a change whose paired 95 % interval leaves out 0."
    return "\n".join([*lines, "", note, *few(lines)])


def overview(models: Mapping[str, Sequence[Result]]) -> str:
    """The headlines of all models side by side, and trivial players', as a Markdown table."""
    lines = [
        f"| suite | metric | decoding | {' | '.join(models)} | trivial players |",
        f"|---|---|---|{'---:|' * len(models)}---|",
    ]
    for results in zip(*models.values(), strict=True):
        for row in zip(*(each.main_numbers() for each in results), strict=True):
            cells = " | ".join(bounded(each.estimate, "value", each.format) for each in row)
            place = f"{results[0].title} | {row[0].label} | {results[0].mode}"
            lines.append(f"| {place} | {cells} | {_players([each.players for each in row], row[0].format, ' / ')} |")
    return "\n".join(lines)


def as_text(value: float | None, format: str, sign: str = "", unit: str = "") -> str:
    """A number as a metric's `format` says: "percent", or a format spec."""
    if value is None:
        return "n/a"
    return f"{100 * value:{sign}.1f}{unit}" if format == "percent" else f"{value:{sign}{format}}"


def changed(row: Mapping[str, Any]) -> str:
    """A row's difference and interval: `-4.0 [-5.9, -2.1]`, or `-4.0, too few (3)` where three games bear on it."""
    return bounded(row, "difference", row["format"], "+")


def players_of(row: Mapping[str, Any]) -> str:
    """What trivial players get on the row's items: `random legal 85.8, first legal 87.5`.

    Two numbers, `0.514 → 0.521`, where the items that are counted are others before and after, as those of skill are.
    """
    return _players([row["baselines"], row["baselines_after"]], row["format"], " → ")


def too_few(clusters: int) -> str:
    """In place of an interval that so few games, or items of no shared game, cannot give."""
    return f"too few ({clusters})"


def few(lines: Sequence[str]) -> list[str]:
    """What `too_few` means, below a table that says it."""
    return [_TOO_FEW] if any("too few (" in line for line in lines) else []


def _mode(result: Result) -> str:
    temperature = result.settings.get("temperature")
    return f"{result.mode}, T={temperature:g}" if isinstance(temperature, float) and temperature else result.mode


def _comparison_line(row: Mapping[str, Any], width: int = _LABEL) -> str:
    label, format = f"  {row['label']}{' *' if row['headline'] else ''}", row["format"]
    before, after = as_text(row["before"], format), as_text(row["after"], format)
    change, low, high = (as_text(row[name], format, "+") for name in ("difference", "ci_low", "ci_high"))
    interval = f"[{low}, {high}]" if row["ci_low"] is not None else ""
    if row["difference"] is not None and row["clusters"] < MIN_CLUSTERS:
        interval = too_few(row["clusters"])
    mark = ("+" if change.startswith("+") else "-") if row["significant"] else ""
    return f"{label:{width}}{before:>9}{after:>9}{change:>9}   {interval:<18} {mark}".rstrip()


def _loss_lines(rows: Sequence[Mapping[str, Any]], of_what: str) -> list[str]:
    lost, words = losses(rows, of_what)
    lines = [f"Significant losses: {words or f'none among 0 {of_what}'}{'' if lost else '.'}"]
    for row in lost:
        line = _comparison_line({**row, "label": f"{row['prefix']} {row['label']}".strip()}, _LABEL + 3)
        lines.append(f"{line} {row['mode']}")
    return lines


def _players(sides: Sequence[Mapping[str, float]], format: str, between: str) -> str:
    """What trivial players get: a number each, or where the sides (models, modes, before and after) count other items,
    as those of skill are, one for each side."""
    found = []
    for player in dict.fromkeys(player for side in sides for player in side):
        values = [as_text(side.get(player), format) for side in sides]
        found.append(f"{player} {between.join(values if len({*values}) > 1 else values[:1])}")
    return ", ".join(found)


def _player_lines(metrics: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each metric's label and players, where there are any."""
    lines = [f"    {label:{_LABEL - 5}} {players}" for label, players in metrics if players]
    head = ["  trivial players, same items"] if lines else []
    return [part for line in head + lines for part in textwrap.wrap(line, 100, subsequent_indent=" " * _LABEL)]


def _group_lines(modes: Sequence[Result]) -> list[str]:
    """The headlines of each group; modes side by side."""
    lines: list[str] = []
    counts = [each.groups() for each in modes]
    for metric in modes[0].heads if counts[0] else ():
        lines += ["", f"  {metric.label}, by {', '.join(dict.fromkeys(kind for kind, _ in counts[0]))}"]
        for kind, value in dict.fromkeys(group for of_mode in counts for group in of_mode):
            count = next(of_mode[kind, value] for of_mode in counts if (kind, value) in of_mode)
            parts = [each.select(**{kind: value}) for each in modes]
            cells = [_cell(part.estimates()[metric.name], metric.format) if part.items else " " * 25 for part in parts]
            lines.append(_row(f"    {value[:26]:26}{count:6}", cells))
    return lines


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:{_LABEL}}{'   '.join(cells)}".rstrip()


def _cell(result: Estimate, format: str) -> str:
    """25 characters: the value and its interval."""
    if result["value"] is None:
        return f"{'n/a':>8}{'':17}"
    low, high = as_text(result["ci_low"], format), as_text(result["ci_high"], format)
    interval = too_few(result["clusters"]) if result["ci_low"] is None else f"[{low}, {high}]"
    return f"{as_text(result['value'], format):>8}{interval:>17}"


def bounded(found: Mapping[str, Any], of: str, format: str, sign: str = "") -> str:
    """A value with its interval, `-4.0 [-5.9, -2.1]`, or `-4.0, too few (3)` where three games bear on it; where one
    side is open, the bound alone."""
    value, low, high = (as_text(found[name], format, sign) for name in (of, "ci_low", "ci_high"))
    if found[of] is None or (found["ci_low"] is None and found["ci_high"] is None):
        return value if found[of] is None else f"{value}, {too_few(found['clusters'])}"
    if found["ci_low"] is None or found["ci_high"] is None:
        return f"< {high}" if found["ci_low"] is None else f"> {low}"
    return f"{value} [{low}, {high}]"
