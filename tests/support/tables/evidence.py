"""The tables of docs/evidence.md, of the files under `benchmarks/results/evidence/`."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from benchmarks.evidence.__main__ import as_markdown
from tests.support.tables.cells import change, interval, minus, number, only, read, table

HEADLINES = {"best_legal": "legality", "skill": "skill", "exact": "exactness"}

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
TRIALS_3 = {
    "exact": "exact gradient, rate 2e-4, β 0.01",
    "exact_kl_0.05": "β 0.05",
    "exact_kl_0.1": "β 0.1",
    "exact_kl_0.2": "β 0.2",
    "exact_answer_tokens_1": "weight 1 of an `A:` answer's tokens, not 0.1",
    "exact_muon_1e-3": "Muon at 1e-3 on the block matrices",
    "exact_no_checks": "no quota of positions in check",
    "exact_best_legal_0.4": "a legal `B:` earns 0.4 and more, not 0.2",
    "exact_rate_1e-4": "rate 1e-4",
    "exact_groups_of_4": "32 prompts of 4 samples, not 48 of 2",
    "exact_half_environment": "half of the prompts `A:`, not a quarter",
    "sampled": "sampled GRPO, rate 2e-4, β 0.01",
    "sampled_kl_0.1": "sampled GRPO, β 0.1",
}
TRIALS_9 = {
    "exact": "exact gradient, β 0.01",
    "exact_kl_0.1": "β 0.1",
    "exact_format_kl_0.1": "β 0.1, the format held: what all arms have",
    "exact_kl_0.2": "β 0.2",
}
CHECKS = {
    "exact_format_kl_0.1": "a quarter",
    "exact_format_kl_0.1_checks_1_6": "a sixth: the demo's",
    "exact_format_kl_0.1_checks_1_12": "a twelfth",
    "exact_format_kl_0.1_no_checks": "as rare as they are",
}
READABLE, LISTS = ("parsed", "greedy", ""), ("candidates_legal_distinct", "greedy", "")
LEGAL, SKILL, EXACT = (("best_legal", "greedy", ""), ("skill", "greedy", ""), ("exact", "greedy", ""))


def arms(name: str) -> str:
    return minus(as_markdown(read(f"evidence/{name}")))


def by_group() -> str:
    found = read("evidence/test-3min-groups")["groups"]
    rows = []
    for (metric, group), label in GROUPS.items():
        own = partial(only, found, metric=metric, group=group, mode="greedy")
        base = own(arm="base")
        arms = [change(own(arm=arm), bounds="+.3f") for arm in ("exact", "sampled", "gold", "raft")]
        rows.append((label, f"{base['items']:,}", number(base["value"]), *arms))
    return table(("metric", "items", "base", "exact", "sampled", "gold", "raft"), "lrrllll", rows)


def times_as_long() -> str:
    found = read("evidence/test-curves")["times_longer"]
    rows = []
    for metric, label in HEADLINES.items():
        cells = [
            only(found, metric=metric, mode=mode, minutes=minutes)
            for minutes in (15.0, 6.0)
            for mode in ("greedy", "sampled")
        ]
        texts = [f"{number(c['median'], '.1f')} {interval(c['ci_low'], c['ci_high'], '.1f')}" for c in cells]
        rows.append((label, *(text.replace("inf", "∞").replace("[0.0,", "[0,") for text in texts)))
    return table(("metric", "15 minutes, greedy", "sampled", "6 minutes, greedy", "sampled"), "lllll", rows)


def other_positions() -> str:
    before, after = read("before_after")["models"]
    found = after["comparison"]

    def row(label: str, task: str, metric: str, *beside: str, percent: bool = True) -> tuple[str, ...]:
        own = only(found, task=task, metric=metric, mode="greedy")
        if percent:
            sides = [only(m["results"], name=task, mode="greedy")["metrics"][metric] for m in (before, after)]
            ends = [f"{100 * s['value']:.1f} % {interval(100 * s['ci_low'], 100 * s['ci_high'], '.1f')}" for s in sides]
            return label, *ends, change(own, "+.1f", ".1f", 100), *beside
        rules = metric.removeprefix("elo_")
        ratings = [only(m["results"], name=task)["ratings"][rules][m["name"]] for m in (before, after)]
        ends = [
            f"{number(own[side], '.0f')} {interval(r['ci_low'], r['ci_high'], '.0f')}"
            for side, r in zip(("before", "after"), ratings, strict=True)
        ]
        return label, *ends, change(own, "+.0f", ".0f"), *beside

    def trivial(task: str) -> list[str]:
        known = only(found, task=task, metric="solved", mode="greedy")["baselines"]
        return [f"{100 * known[name]:.1f} %" for name in ("random legal", "most material")]

    def capture(rules: str) -> str:
        rating = only(after["results"], name="ladder")["ratings"][rules]["greedy capture"]["elo"]
        return f"{number(rating, '.0f')} (greedy capture)"

    opening = only(read("demo")["groups"], group="stratum=human_opening", metric="skill", mode="greedy")
    human = (
        "human opening lines that the engine played on, skill (242)",
        number(opening["before"]),
        number(opening["after"]),
        change(opening),
        "0",
        f"{opening['baselines']['most material']:.3f}",
    )
    rows = [
        row("mate in one, solved (1,200)", "mate in one", "solved", *trivial("mate in one")),
        row("tactics, solved (1,000 of test)", "tactics", "solved", *trivial("tactics")),
        row("Strategic Test Suite, points of all (1,131)", "sts_v8.epd", "solved", *trivial("sts_v8.epd")),
        human,
        row("ladder, strict: points of 280 games", "ladder", "strict", "", ""),
        row("ladder, lenient: points of 280 games", "ladder", "lenient", "", ""),
        row("ladder, strict: Elo (random mover 0)", "ladder", "elo_strict", "0", capture("strict"), percent=False),
        row("ladder, lenient: Elo", "ladder", "elo_lenient", "0", capture("lenient"), percent=False),
    ]
    return table(("", "before", "after", "change", "random legal", "most material"), "lllllr", rows)


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
            cells = [change(each, bounds="+.3f") if "difference" in each else number(each["value"]) for each in own]
            rows.append((label if model == "base" else "", model, *cells))
    return table(("right", "", *(f"pass@{k}" for k in ks)), "lllll", rows)


def trials(
    name: str, labels: Mapping[str, str], columns: Mapping[str, tuple[str, str, str]], first: str | None = None
) -> str:
    """Each trial's difference from the one that is named first or that its own name begins with.

    Args:
        labels: of the trials, in order.
        columns: head -> (metric, mode, group).
        first: what all are compared with; None: the arm.
    """
    found = read(f"evidence/{name}")["trials"]
    rows = []
    for trial, label in labels.items():
        own = [only(found, trial=trial, metric=m, mode=mode, group=group) for m, mode, group in columns.values()]
        against = first or trial.partition("_")[0]
        cells = [number(c["value"]) if trial == against else change(c["beside"][against]) for c in own]
        rows.append((label, own[0]["seeds"], *cells))
    heads = ("share of checks" if first else "trial", "seeds", *columns)
    return table(heads, "lr" + "l" * len(columns), rows)


def trials_of_three_minutes() -> str:
    columns = {"legality": LEGAL, "skill": SKILL, "exactness": EXACT}
    return trials("trials-3min", TRIALS_3, columns | {"answers that can be read": READABLE, "five candidates": LISTS})


def trials_of_nine_minutes() -> str:
    columns = {"legality": LEGAL, "skill": SKILL, "exactness": EXACT, "exactness, sampled": ("exact", "sampled", "")}
    return trials("trials-9min", TRIALS_9, columns | {"answers that can be read": READABLE, "five candidates": LISTS})


def checks() -> str:
    items = read("evidence/trials-9min")["policy items"]["in check"]
    columns = {"legality": LEGAL, f"in check ({items})": ("best_legal", "greedy", "in check")}
    columns |= {"not in check": ("best_legal", "greedy", "not in check"), "skill": SKILL, "exactness": EXACT}
    return trials("trials-9min", CHECKS, columns | {"five candidates": LISTS}, first=next(iter(CHECKS)))


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
    for name, minutes in (("test-3min", "three CPU minutes"), ("test-6min", "eight to ten CPU minutes")):
        report = read(f"evidence/{name}")
        value = {(v["arm"], v["metric"]): v["mean"] for v in report["values"] if v["mode"] == "greedy"}
        if not rows:
            rows.append(("0", "", *(number(value["base", metric]) for metric in HEADLINES)))
        made = sorted({*report["updates"]["stock"], *report["updates"]["stock_positions"]})
        steps = f"{made[0]} to {made[-1]}" if len(made) > 1 else made[0]
        both = [", ".join(number(value[arm, metric]) for arm in ("stock", "stock_positions")) for metric in HEADLINES]
        rows.append((f"{steps} ({minutes})", len(report["updates"]["stock"]), *both))
    heads = ("updates", "seeds", "legality: as it is, right positions", "skill", "exactness")
    return table(heads, "rrlll", rows)


TABLES = {
    "three-minutes": lambda: arms("test-3min"),
    "groups": by_group,
    "equal-samples": lambda: arms("test-7500samples"),
    "times-as-long": times_as_long,
    "six-minutes": lambda: arms("test-6min"),
    "other-positions": other_positions,
    "pass-at-k": pass_at_k,
    "ablations": lambda: arms("test-3min-ablations"),
    "trials-3": trials_of_three_minutes,
    "trials-9": trials_of_nine_minutes,
    "checks": checks,
    "padding": padding,
    "updates": updates,
}
