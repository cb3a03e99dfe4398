"""The tables of docs/exact-gradient.md: what is left out, two demos, tactics."""

from collections.abc import Mapping
from typing import Any

from tests.support.tables.cells import change, interval, number, only, players, read, table

LEFT_OUT = {
    "cosine of computed and whole": "cosine of the computed part and the whole gradient",
    "left out / computed": "norm of what is left out, over that of what is computed",
    "cosine of computed and left out": "cosine of what is computed and what is left out",
    "noise of computed / its norm": "noise of the mean of 1,536 completions, over its norm: computed",
    "noise of left out / its norm": "the same: left out",
}
METRICS = {
    ("policy", "best_legal"): "legality",
    ("policy", "skill"): "skill",
    ("environment", "exact"): "exactness",
    ("environment", "truncated_recall"): "recall of illegal moves",
    ("environment", "terminated_precision"): "precision of ends (mates, stalemates …)",
}
KINDS = {
    "all": "all",
    "material": "takes the most",
    "capture": "takes less",
    "check": "gives check, takes nothing",
    "quiet": "quiet",
}


def left_out() -> str:
    found = read("later_effects")["results"]
    rows = [(label, f"{found[n]['value']:.2f} ± {found[n]['standard_error']:.2f}") for n, label in LEFT_OUT.items()]
    return table(("", ""), "lr", rows)


def demos() -> str:
    """The headlines, every significant loss of either run, and two suites; what got significantly worse is bold."""
    runs = [read(name)["metrics"] for name in ("demo", "demo_long")]
    lost = {(row["task"], row["metric"], row["mode"]) for run in runs for row in run if row["loss"]}
    rows = []
    for (task, metric), label in METRICS.items():
        for mode in ("greedy", "sampled"):
            short, long = (only(run, task=task, metric=metric, mode=mode) for run in runs)
            if not short["headline"] and (task, metric, mode) not in lost:
                continue
            beside = f" ({players(short, ('random legal', 'most material'))})" if metric == "skill" else ""
            name = "" if rows and rows[-1][0].startswith(label) else label + beside
            rows.append((name, mode, number(short["before"]), *map(_after, (short, long))))
    suites, after = (read(name)["models"][-1]["results"] for name in ("demo_long_problems", "before_after"))
    before = read("before_after")["models"][0]["results"]
    for suite, label in (("tactics", "tactics of test, solved"), ("mate in one", "mates in one, solved")):
        start, short, long = (
            only(of, name=suite, mode="greedy")["metrics"]["solved"] for of in (before, after, suites)
        )
        known = only(before, name=suite, mode="greedy")["baselines"]["solved"]
        beside = ", ".join(f"{name} {known[name]:.3f}" for name in ("random legal", "most material"))
        cells = [_beside(each, start) for each in (short, long)]
        rows.append((f"{label} ({beside})", "greedy", number(start["value"]), *cells))
    return table(("", "decoding", "before", "demo, 300 steps", "long demo, 1,200 steps"), "llrll", rows)


def _after(row: Mapping[str, Any]) -> str:
    mark = "**" if row["loss"] else ""
    ends = interval(row["ci_low"], row["ci_high"])
    return f"{mark}{number(row['after'])}{mark}, {number(row['difference'], '+.3f')} {ends}"


def _beside(own: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Not paired: worse where the intervals do not meet."""
    mark = "**" if own["ci_high"] < start["ci_low"] else ""
    return f"{mark}{number(own['value'])}{mark} {interval(own['ci_low'], own['ci_high'])}"


def tactics() -> str:
    report = read("tactics-dev-models")
    rows = []
    for kind, label in KINDS.items():
        before, after = report["results"][f"tactics, {kind}"].values()
        low, high = after["interval, minus nano"]
        row = {"difference": after["minus nano"], "ci_low": low, "ci_high": high}
        values = [f"{100 * each['value']:.1f} %" for each in (before, after)]
        most = f"{100 * report['trivial players']['material']:.1f} %" if kind == "all" else ""
        count = f"{report['positions of a kind'][kind]:,}" if kind != "all" else f"{report['positions']:,}"
        rows.append((label, count, *values, change(row, "+.1f", "+.1f", 100), most))
    heads = ("the winning move", "positions", "before", "after", "change, 95 % interval", "most material")
    return table(heads, "lrrrlr", rows)


def settings() -> str:
    """Trials of the demo's settings on dev from the present start: what each changes, greedy, and its losses."""
    trials = {
        name: each
        for name, each in read("demo_trials")["trials"].items()
        if name.startswith("n3_") and name != "n3_mates"
    }
    shown = ("learning_rate", "beta", "mix_env_ratio", "num_generations", "policy_strata", "steps")
    heads = ("rate", "β", "`A:`", "samples", "in check", "steps")
    heads += ("legality", "skill", "exactness", "five", "`P:` reward", "losses")
    rows = []
    for trial in sorted(trials.values(), key=lambda each: (each["steps"], -each["beta"])):
        values = {name: trial[name] for name in shown} | {"policy_strata": trial["policy_strata"]["check"]}
        of = {place: trial["metrics"][f"{place}, greedy"] for place in ("policy", "environment")}
        cells = [of["policy"][name] for name in ("best_legal", "skill")] + [of["environment"]["exact"]]
        cells += [of["policy"][name] for name in ("candidates_legal_distinct", "continuous")]
        lost = sum(each["loss"] for metrics in trial["metrics"].values() for each in metrics.values())
        rows.append([*(f"{value:g}" for value in values.values()), *(change(each) for each in cells), lost])
    return table(heads, "r" * 6 + "l" * 5 + "r", rows)


TABLES = {"left-out": left_out, "demos": demos, "settings": settings}
APPENDIX = {"tactics": tactics}
