"""The tables of docs/evidence.md and docs/evidence-tables.md, of the files under `benchmarks/results/evidence/`."""

from functools import partial

import numpy as np

from benchmarks.evidence import store
from benchmarks.evidence.report import COMPARED, arms_table, changes_table, pairs_table
from rookworld_trl.measuring.intervals import ratios
from tests.support.tables.cells import change, interval, minus, number, only, read, table

REPORT = "evidence/test-3min"
GROUPS = {  # metric, group, label
    ("skill", "White to move"): "skill, White to move",
    ("skill", "Black to move"): "skill, Black to move",
    ("best_legal", "White to move"): "legality, White to move",
    ("best_legal", "Black to move"): "legality, Black to move",
    ("best_legal", "in check"): "legality, in check",
    ("best_legal", "not in check"): "legality, not in check",
    ("exact", "mate"): "exact, mates",
    ("exact", "illegal"): "exact, illegal moves",
    ("exact", "stalemate"): "exact, stalemates",
    ("exact", "dead_material"): "exact, dead material",
    ("exact", "castling_right_taken"): "exact, castling right taken",
}


def trials() -> str:
    """Each arm's trials on dev: the headlines at half the rate, the rate and twice the rate, the highest sum bold."""
    found: dict[str, dict[float, list[float]]] = {}
    for name in store.names("dev"):
        run = store.read("dev", name)
        arm, _, factor = run.facts["arm"].partition("_rate_")
        if factor:
            values = headlines(run)
            found.setdefault(arm, {})[float(factor)] = values
    start = summed(headlines(store.read("dev", "base-0min-seed0")))
    rows: list[tuple[str, ...]] = [("(no training)", "", start, "")]
    for arm in sorted(found):
        best = max(found[arm], key=lambda factor: sum(found[arm][factor]))
        rows.append((arm, *(summed(values, "**" * (factor == best)) for factor, values in sorted(found[arm].items()))))
    return table(("sum (legality, skill, exactness)", "half the rate", "the rate", "twice the rate"), "llll", rows)


def summed(values: list[float], mark: str = "") -> str:
    return f"{mark}{sum(values):.3f}{mark} ({', '.join(number(value) for value in values)})"


def headlines(run: store.Result) -> list[float]:
    """A run's legality, skill and exactness, greedy."""
    found = {}
    for task in store.SHOWN:
        values = ratios(*run.terms[task, "greedy"])
        found |= {metric.name: float(v) for metric, v in zip(store.metrics_of(task), values, strict=True)}
    return [found[name] for name in COMPARED]


def by_group() -> str:
    found = read(REPORT)["groups"]
    shown = ("exact", "sampled", "gold", "raft")
    rows = []
    for (metric, group), label in GROUPS.items():
        own = partial(only, found, metric=metric, group=group, mode="greedy")
        cells = [change(own(arm=arm), bounds="+.3f") for arm in shown]
        rows.append((label, f"{own(arm=shown[0])['items']:,}", *cells))
    return table(("metric", "items", *shown), "lrllll", rows)


def other_positions() -> str:
    before, after = read("before_after")["models"]
    found = after["comparison"]

    def row(label: str, task: str) -> tuple[str, ...]:
        own = only(found, task=task, metric="solved", mode="greedy")
        sides = [only(m["results"], name=task, mode="greedy")["metrics"]["solved"] for m in (before, after)]
        ends = [f"{100 * s['value']:.1f} % {interval(100 * s['ci_low'], 100 * s['ci_high'], '.1f')}" for s in sides]
        trivial = [f"{100 * own['baselines'][name]:.1f} %" for name in ("random legal", "most material")]
        return label, *ends, change(own, "+.1f", ".1f", 100), *trivial

    opening = only(read("demo")["groups"], group="stratum=human_opening", metric="skill", mode="greedy")
    ends = [number(opening[side]) for side in ("before", "after")]
    material = f"{opening['baselines']['most material']:.3f}"
    rows = [
        row("mate in one, solved (1,200)", "mate in one"),
        row("tactics, solved (1,000 of test)", "tactics"),
        row("Strategic Test Suite, points of all (1,131)", "sts_v8.epd"),
        ("human opening lines that the engine played on, skill (242)", *ends, change(opening), "0", material),
    ]
    return table(("", "before", "after", "change", "random legal", "most material"), "lllllr", rows)


def play() -> str:
    """Games won, drawn and lost against the ladder's weaker and stronger anchors, and how many were repetitions."""
    rows = []
    for rules in ("strict", "lenient"):
        for model, when in zip(read("former_play")["models"], ("before", "after"), strict=True):
            matches = only(model["results"], name="ladder")["matches"][rules]
            weak = [match for name, match in matches.items() if not name.startswith("Stockfish")]
            for label, own in (("random, greedy capture", weak), ("all seven", list(matches.values()))):
                won, drawn, lost = (sum(match[what] for match in own) for what in ("won", "drawn", "lost"))
                repeated = sum(match["ends"].get("drawn by threefold repetition", 0) for match in own)
                rows.append((rules, label, when, won, drawn, f"{repeated}", lost))
    rows.sort(key=lambda row: (row[0] != "strict", row[1] != "all seven"))
    return table(("rules", "against", "", "won", "drawn", "of these repeated", "lost"), "lllrrrr", rows)


def padding() -> str:
    def nats(value: float) -> str:
        return np.format_float_positional(value, precision=2, fractional=False, trim="-")

    rows = []
    for padded, of in read("stock_logprobs")["by_padding"].items():
        error, fixed = of["stock against sampler"], of["with position ids against sampler"]
        outside = 100 * of["ratio of stock to sampler"]["outside 1 +- 0.2"]
        cells = [nats(error[each]) for each in ("mean", "p95", "max")]
        share = f"{outside:.0f} %"
        rows.append((padded.replace("-", "–"), of["rows"], f"{of['tokens']:,}", *cells, share, nats(fixed["max"])))
    heads = ("padded tokens of the prompt", "completions", "tokens", "mean error", "95th percentile", "worst")
    return table((*heads, "ratio outside 1 ± 0.2", "worst with position ids"), "lrrrrrrr", rows)


TABLES = {
    "arms": lambda: minus(arms_table(read(REPORT))),
    "ours": lambda: minus(pairs_table(read(REPORT))),
    "other-positions": other_positions,
    "play": play,
}
APPENDIX = {
    "changes": lambda: minus(changes_table(read(REPORT))),
    "trials": trials,
    "groups": by_group,
    "padding": padding,
}
