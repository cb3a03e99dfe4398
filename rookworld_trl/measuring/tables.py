"""Evaluations, suites and comparisons as text, at most 100 columns wide."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from rookworld_trl.chess import PREFIXES, TaskName
from rookworld_trl.chess.accuracy import Evaluation
from rookworld_trl.chess.suite import SuiteResult
from rookworld_trl.measuring.comparison import Comparison
from rookworld_trl.measuring.intervals import MIN_CLUSTERS
from rookworld_trl.measuring.metrics import HEADLINES, METRICS, Estimate, estimate, shared

_LABEL = 36
_STAKE = {"nothing": "nothing at stake", "something": "something at stake"}
_TOO_FEW = f"too few (n): fewer than {MIN_CLUSTERS} games, openings, or items of no shared game bear on it: no interval"


def evaluation_table(evaluation: Evaluation) -> str:
    """All metrics of each task, modes side by side, trivial players, and the headlines by colour, stake and stratum."""
    lines: list[str] = []
    for task in METRICS:
        modes = [mode for name, mode in evaluation.tasks_and_modes() if name == task]
        if not modes:
            continue
        own = (evaluation.settings.get("task_sampling") or {}).get(task, {})
        temperature = own.get("temperature", evaluation.settings.get("temperature", 1.0))
        heads = ["greedy" if mode == "greedy" else f"sampled, T={temperature:g}" for mode in modes]
        items = len(evaluation.select(task, modes[0]))
        title = f"{PREFIXES[task].strip()} {task}, {items} items"
        lines += [_row(title, [f"{head:>8}{'95 % interval':>17}" for head in heads])]
        lines += ["-" * len(lines[-1])]
        results = [evaluation.estimates(task, mode) for mode in modes]
        for metric in METRICS[task]:
            star = " *" if metric.name in HEADLINES[task] else ""
            cells = [_cell(result[metric.name], metric.format) for result in results]
            lines.append(_row(f"  {metric.label}{star}", cells))
        trivial = [evaluation.baselines(task, mode) for mode in modes]
        of_task = [
            line
            for m in METRICS[task]
            if m.name in trivial[0]
            for line in _by_items(m.label, m.format, dict(zip(modes, (of[m.name] for of in trivial), strict=True)))
        ]
        lines += ["", *baseline_lines(of_task), "", *_group_lines(evaluation, task, modes), ""]
    games = [item.game for item in evaluation.items if item.mode == evaluation.items[0].mode]
    intervals = "Wilson for shares, bootstrap for the rest"
    if shared(games):
        count = len({game or i for i, game in enumerate(games)})
        intervals = f"{'bootstrap' if count >= MIN_CLUSTERS else 'none'} over {count} games"
    return "\n".join([*lines, f"* headline metrics. Shares in percent; intervals: {intervals}.", *few(lines)])


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
        prefix = PREFIXES.get(cast(TaskName, task), "")
        for mode in dict.fromkeys(row["mode"] for row in of_task):
            of_mode = [row for row in of_task if row["mode"] == mode]
            head = f"{prefix}{task}, {mode}, {of_mode[0]['items']} items"
            lines += [f"{head:{_LABEL}}{'before':>9}{'after':>9}{'change':>9}   95 % interval", "-" * 84]
            lines += [*map(_comparison_line, of_mode), ""]
        modes = list(dict.fromkeys(row["mode"] for row in of_task))
        trivial = []
        for metric in dict.fromkeys(row["metric"] for row in of_task):
            rows_of = [row for row in of_task if row["metric"] == metric]
            by_items: dict[str, Mapping[str, float]] = {}
            for row in rows_of:
                mode = f"{row['mode']} " if len(modes) > 1 else ""
                by_items |= {f"{mode}before": row["baselines"], f"{mode}after": row["baselines_after"]}
            trivial += _by_items(rows_of[0]["label"], rows_of[0]["format"], by_items)
        if any(values for *_, values in trivial):
            lines += [*baseline_lines(trivial), ""]
    note = "* headline metrics; + or - marks a change whose paired 95 % interval leaves out 0."
    lines += _loss_lines(rows, "metrics")
    if groups:
        named: list[Any] = [{**row, "label": f"{row['group']}: {row['label']}"} for row in groups]
        lines += _loss_lines(named, "headline metrics by colour, stake and stratum")
    return "\n".join([*lines, "", note, *few(lines)])


def suite_table(result: SuiteResult) -> str:
    """The suite's metrics, trivial players, then the headline by group."""
    title, games = f"{result.name}, {len(result.items)} items", [item.game for item in result.items]
    if shared(games):
        title += f" of {len({game or i for i, game in enumerate(games)})} games, over which intervals are"
    settings = ", ".join(f"{name}={value}" for name, value in result.settings.items())
    estimates, trivial = result.estimates(), result.baselines()
    lines = [title, f"  {settings}", *(metric_row(m.label, estimates[m.name], m.format) for m in result.metrics)]
    if trivial:
        of_players = [(m.label, m.format, trivial[m.name]) for m in result.metrics if m.name in trivial]
        lines += ["", *baseline_lines(of_players)]
    head = result.metrics[0]
    if groups := result.groups():
        lines += ["", f"  {head.label}, by group"]
        lines += [
            metric_row(f"  {name[:36]:36} {count:5}", result.estimates(name)[head.name], head.format)
            for name, count in groups.items()
        ]
    return "\n".join([*lines, *(f"  {line}" for line in few(lines))])


def metric_row(label: str, result: Estimate, format: str) -> str:
    """One line: label, value, 95 % interval."""
    return f"  {label:46}{_cell(result, format)}".rstrip()


def _comparison_line(row: Comparison, width: int = _LABEL) -> str:
    label, format = f"  {row['label']}{' *' if row['headline'] else ''}", row["format"]
    before, after = number(row["before"], format), number(row["after"], format)
    change, low, high = (number(row[name], format, sign=True) for name in ("difference", "ci_low", "ci_high"))
    interval = f"[{low}, {high}]" if row["ci_low"] is not None else ""
    if row["difference"] is not None and row["clusters"] < MIN_CLUSTERS:
        interval = too_few(row["clusters"])
    mark = ("+" if change.startswith("+") else "-") if row["significant"] else ""
    return f"{label:{width}}{before:>9}{after:>9}{change:>9}   {interval:<18} {mark}".rstrip()


def _loss_lines(rows: Sequence[Comparison], of_what: str) -> list[str]:
    known = [row for row in rows if row["better"] and row["difference"] is not None]
    judged = [row for row in known if row["ci_low"] is not None]
    losses = [row for row in judged if row["loss"]]
    of_what += f", and no verdict on {len(known) - len(judged)}" if len(judged) < len(known) else ""
    if not losses:
        return [f"Significant losses: none among {len(judged)} {of_what}."]
    lines = [f"Significant losses: {len(losses)} of {len(judged)} {of_what}"]
    for row in losses:
        prefix = PREFIXES.get(cast(TaskName, row["task"]), "")
        line = _comparison_line({**row, "label": f"{prefix}{row['label']}"}, _LABEL + 3)
        lines.append(f"{line} {row['mode']}")
    return lines


def _by_items(
    label: str, format: str, players: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str, Mapping[str, float]]]:
    """A metric's lines of trivial players: one, or where they are counted over other items for each side, a line each,
    which names the side."""
    if all(found == next(iter(players.values())) for found in players.values()):
        players = {"": next(iter(players.values()))}
    return [(f"{label}, {side}" if side else label, format, found) for side, found in players.items()]


def baseline_lines(metrics: Iterable[tuple[str, str, Mapping[str, float]]]) -> list[str]:
    """What trivial players get: a metric (label, format, value by player) a line, a player a column."""
    metrics = list(metrics)
    players = list(dict.fromkeys(player for *_, values in metrics for player in values))
    widths = {player: max(16, len(player) + 2) for player in players}
    first = max([_LABEL, *(5 + len(label) for label, _, values in metrics if values)])
    lines = ["".join([f"{'  trivial players, same items':{first}}", *(f"{p:>{widths[p]}}" for p in players)])]
    for label, format, values in metrics:
        if values:
            cells = [f"{number(values.get(player), format):>{widths[player]}}" for player in players]
            lines.append("".join([f"    {label:{first - 4}}", *cells]))
    return lines


def _group_lines(evaluation: Evaluation, task: TaskName, modes: Sequence[str]) -> list[str]:
    lines = []
    for metric in (m for m in METRICS[task] if m.name in HEADLINES[task]):
        lines += [f"  {metric.label}, by colour, stake and stratum"]
        for name, value in evaluation.groups(task):
            members = [evaluation.select(task, mode, **{name: value}) for mode in modes]
            group = [estimate([i.scores for i in items], [metric], [i.game for i in items]) for items in members]
            label = f"    {_STAKE.get(value, value):18}{len(members[0]):6} items"
            lines.append(_row(label, [_cell(found[metric.name], metric.format) for found in group]))
    return lines


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:{_LABEL}}{'   '.join(cells)}".rstrip()


def _cell(result: Estimate, format: str) -> str:
    """25 characters: the value and its interval."""
    if result["value"] is None:
        return f"{'n/a':>8}{'':17}"
    low, high = number(result["ci_low"], format), number(result["ci_high"], format)
    interval = too_few(result["clusters"]) if result["ci_low"] is None else f"[{low}, {high}]"
    return f"{number(result['value'], format):>8}{interval:>17}"


def too_few(clusters: int) -> str:
    """In place of an interval that so few games, or items of no shared game, cannot give."""
    return f"too few ({clusters})"


def few(lines: Sequence[str]) -> list[str]:
    """What `too_few` means, below a table that says it."""
    return [_TOO_FEW] if any("too few (" in line for line in lines) else []


def number(value: float | None, format: str, sign: bool = False) -> str:
    if value is None:
        return "n/a"
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if format == "percent" else f"{value:{plus}{format}}"
