"""The tables of docs/start-or-rl.md: starts before and after RL, aims, and what did not teach the rules."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.evidence import store
from benchmarks.evidence.statistics import Side, estimates
from tests.support.tables.cells import interval, number, only, read, table

HEADLINES = {  # their names, and the task that has them
    "best_legal": ("legality", "policy"),
    "skill": ("skill", "policy"),
    "exact": ("exactness", "environment"),
}
AIMS = {
    "best_legal": "legality",
    "skill": "skill",
    "candidates_legal_distinct": "five candidates",
    "exact": "exactness",
}
WAYS = {
    "shipped": "shipped",
    "more checks": "30 % of `P:` in check",
    "heavier kings": "and kings' squares count five times",
    "slips in lists": "wrong moves in the lists, which `B:` must avoid",
}


def steps(value: float) -> str:
    """Two digits; from a million on in millions, and without an end beyond a hundred of them."""
    if value > 1e8:
        return "no end"
    rounded = float(f"{value:.2g}")
    return f"{rounded / 1e6:g} million" if rounded >= 1e6 else f"{rounded:,.0f}"


def aims() -> str:
    report = read("evidence/starts")
    last = report["starts"][-1]["steps"]
    rows = []
    for metric, label in AIMS.items():
        own = [row for row in report["reach"] if row["metric"] == metric]
        cells = [f"{steps(r['median'])} [{steps(r['ci_low'])}, {steps(r['ci_high'])}]" for r in own]
        rows.append((label, number(own[0]["now"]), f"{own[0]['aim']:.2f}", *cells))
    heads = ("", f"after {last:,} steps", "aim", "steps by all four starts", "by the last three")
    return table(heads, "lrrll", rows)


def ways() -> str:
    found = [read("legality")["checkpoints"][name] for name in WAYS]
    count = found[0]["positions"]
    rows = [
        (f"illegal `B:`, in check ({count['in check']})", *(each["illegal"]["in check"] for each in found)),
        (f"illegal `B:`, others ({count['other']:,})", *(each["illegal"]["other"] for each in found)),
        ("of all, the king goes where it is attacked", *(each["kinds"]["into_check"] for each in found)),
        (
            "legal behind a king's square, not in check",
            *(f"{100 * each['mass']['other']['K'][0]:.1f} %" for each in found),
        ),
    ]
    return table(("", *WAYS.values()), "lrrrr", rows)


def cell(value: Mapping[str, float], spec: str = ".3f", bold: bool = False) -> str:
    """Mean and interval; with `bold`, the mean is bold where the interval leaves out 0."""
    low, high = value["ci_low"], value["ci_high"]
    mark = "**" if bold and not low <= 0 <= high else ""
    return f"{mark}{number(value['mean'], spec)}{mark} {interval(low, high, spec)}"


def starts() -> str:
    """Each start before and after RL, and what RL has more than the start and than the next one before RL."""
    known = read("evidence/starts")["starts"]
    runs: dict[str, list[Any]] = {}
    for start in known:
        for name in store.names("dev", str(start["steps"])):
            found = store.read("dev", name)
            runs.setdefault(f"{found.facts['arm']} {start['steps']}", []).append(found)
    rows = []
    for metric, (label, task) in HEADLINES.items():
        column = [each.name for each in store.metrics_of(task)].index(metric)

        def shown(one: str, other: str = "", task: str = task, column: int = column) -> str:
            sides = [
                Side([run.terms[task, "greedy"] for run in runs[name]], trained=name.startswith("exact"))
                for name in filter(None, (one, other))
            ]
            found = estimates(sides[0], runs[one][0].games[task], *sides[1:])[column]
            low, high = found.interval
            return cell({"mean": found.value, "ci_low": low, "ci_high": high}, "+.3f" if other else ".3f", bool(other))

        for start, following in zip(known, [*known[1:], None], strict=True):
            base, exact = (f"{arm} {start['steps']}" for arm in ("base", "exact"))
            cells = [label, f"{start['steps']:,}", f"{start[task]:.3f}", shown(base), shown(exact), shown(exact, base)]
            rows.append((*cells, shown(exact, f"base {following['steps']}") if following else ""))
    heads = ("metric", "supervised steps", "loss before", "before RL", "after RL", "gain")
    return table((*heads, "RL − the next start before RL"), "lrrllll", rows)


def side_in_front() -> str:
    """Of 800 steps from scratch: as it was, with a mark of the side to move in front, and with mirrored positions."""
    report = read("nano3_trials")
    base, changed = report["trials"]["base"], ("side_first", "mirror")

    def of_each(label: str, value: Callable[[Mapping[str, Any]], str]) -> tuple[str, ...]:
        return label, value(base), *(each for name in changed for each in (value(report["trials"][name]), ""))

    rows = [
        of_each("nats a right answer, `P:`", lambda trial: f"{trial['nats']['policy']:.1f}"),
        of_each("nats a right answer, `A:`", lambda trial: f"{trial['nats']['environment']:.2f}"),
        of_each("training loss, last 50 steps", lambda trial: f"{trial['loss']['800']:.3f}"),
    ]
    for label, metric in (("exactness", "exact"), ("legality", "best_legal"), ("skill", "skill")):
        for group, of in (("all", ""), ("color=white", ", White to move"), ("color=black", ", Black to move")):
            pairs = [only(report["less_base"][name], group=group, metric=metric) for name in changed]
            cells = [number(pairs[0]["before"])]
            for row in pairs:
                cells += [number(row["after"]), cell({**row, "mean": row["difference"]}, "+.3f", True)]
            rows.append((label + of, *cells))
    rows.append(of_each("CPU minutes, on a machine with other work", lambda trial: f"{trial['cpu_minutes']:.1f}"))
    heads = ("", "as it was", "mark in front", "less as it was, paired", "mirrored", "less as it was, paired")
    return table(heads, "lrrlrl", rows)


TABLES = {"starts": starts, "aims": aims}
APPENDIX = {"ways": ways, "side_in_front": side_in_front}
