"""The tables of docs/evidence.md and docs/evidence-tables.md, of the files under `benchmarks/results/evidence/`."""

from functools import partial

import numpy as np

from benchmarks.evidence.report import COMPARED, arms_table, changes_table, pairs_table
from tests.support.tables.cells import change, interval, minus, number, only, read, table

FORMER = "evidence/former-test-"  # by the `P:` reward before the present one
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
RIGHT = {
    "best_legal": "`P:` the move is legal",
    "best_in_top5": "`P:` it is in the top five",
    "top1": "`P:` it is the best one",
    "exact": "`A:` exact",
}


def arms(name: str) -> str:
    return minus(arms_table(read(FORMER + name)))


def pairs(name: str) -> str:
    return minus(pairs_table(read(FORMER + name)))


def changes(name: str) -> str:
    return minus(changes_table(read(FORMER + name)))


def by_group() -> str:
    found = read(FORMER + "3min")["groups"]
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


def pass_at_k() -> str:
    report, ks = read("evidence/pass_at_k"), (1, 4, 16)
    rows = []
    for metric, label in RIGHT.items():
        if metric in ("best_in_top5", "top1"):
            chance = dict(zip((1, 2, 4, 8, 16), report["random legal"][metric], strict=True))
            rows.append((label, "*random legal*", *(number(chance[k]) for k in ks)))
            label = ""
        for model in ("base", "exact", "sampled"):
            own = [only(report["rows"], metric=metric, model=model, k=k) for k in ks]
            cells = [number(each["value"]) for each in own]  # of one run each: no interval
            rows.append((label if model == "base" else "", model, *cells))
    return table(("right", "", *(f"pass@{k}" for k in ks)), "lllll", rows)


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


def updates() -> str:
    rows = []
    for name, minutes in (("former-test-3min", "three CPU minutes"), ("former-test-6min", "eight to ten CPU minutes")):
        report = read(f"evidence/{name}")
        value = {(v["arm"], v["metric"]): v["mean"] for v in report["values"] if v["mode"] == "greedy"}
        if not rows:
            rows.append(("0", "", *(number(value["base", metric]) for metric in COMPARED)))
        made = sorted({*report["updates"]["stock"], *report["updates"]["stock_positions"]})
        steps = f"{made[0]} to {made[-1]}" if len(made) > 1 else made[0]
        both = [", ".join(number(value[arm, metric]) for arm in ("stock", "stock_positions")) for metric in COMPARED]
        rows.append((f"{steps} ({minutes})", len(report["updates"]["stock"]), *both))
    heads = ("updates", "seeds", "legality: as it is, right positions", "skill", "exactness")
    return table(heads, "rrlll", rows)


TABLES = {"arms": lambda: arms("3min"), "ours": lambda: pairs("3min"), "other-positions": other_positions, "play": play}
APPENDIX = {
    "changes": lambda: changes("3min"),
    "six-minutes": lambda: arms("6min"),
    "ours-six-minutes": lambda: pairs("6min"),
    "changes-six-minutes": lambda: changes("6min"),
    "equal-samples": lambda: arms("equal-samples"),
    "changes-equal-samples": lambda: changes("equal-samples"),
    "ablations": lambda: arms("ablations"),
    "changes-ablations": lambda: changes("ablations"),
    "groups": by_group,
    "pass-at-k": pass_at_k,
    "padding": padding,
    "updates": updates,
}
