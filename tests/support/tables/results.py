"""The tables of README.md, docs/results.md and docs/rewards.md: the demo, what was measured, what players earn."""

from collections.abc import Mapping
from typing import Any

from tests.support.tables.cells import interval, number, only, players, read, table

ROWS = {  # label, and the trivial players beside it
    ("policy", "best_legal"): ("`P:` the chosen move is legal", ()),
    ("policy", "skill"): ("`P:` skill", ("random legal", "first legal", "most material")),
    ("policy", "best_in_top5"): ("`P:` in the engine's top five", ("random legal", "most material")),
    ("policy", "candidates_legal_distinct"): ("`P:` five legal and distinct candidates", ()),
    ("environment", "exact"): ("`A:` exact answer", ("input copied",)),
}
PRECISION = {"truncated_recall": "truncated_precision"}  # a recall says little without it


def shown(row: Mapping[str, Any], name: str = "before") -> str:
    return number(row[name]) if row["format"] == ".3f" else f"{100 * row[name]:.1f} %"


def change(row: Mapping[str, Any]) -> str:
    scale, spec = (1, "+.3f") if row["format"] == ".3f" else (100, "+.1f")
    bounds = interval(scale * row["ci_low"], scale * row["ci_high"], spec)
    return f"{number(scale * row['difference'], spec)} {bounds}"


def rows_of(metrics: list[dict[str, Any]], wanted: Mapping[tuple[str, str], Any]) -> list[tuple[str, ...]]:
    rows = []
    for (task, metric), (label, beside) in wanted.items():
        greedy, sampled = (only(metrics, task=task, metric=metric, mode=mode) for mode in ("greedy", "sampled"))
        if beside:
            label += f" ({players(greedy, beside, greedy['format'] == 'percent')})"
        for row, name in ((greedy, label), (sampled, "")):
            rows.append((name, row["mode"], shown(row), shown(row, "after"), change(row)))
    return rows


def lost(row: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """A loss by its name, with the precision beside a recall."""
    label = f"`{row['prefix']}` {row['label']}"
    if row["metric"] in PRECISION:
        beside = only(metrics, task=row["task"], metric=PRECISION[row["metric"]], mode=row["mode"])
        label += f" (precision {100 * beside['before']:.1f} to {100 * beside['after']:.1f} %)"
    return label


def judged() -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """All metrics of the demo, its significant losses, and how many these are of how many."""
    metrics = read("demo")["metrics"]
    known = [row for row in metrics if row["better"] and row["difference"] is not None]
    losses = [row for row in known if row["loss"]]
    return metrics, losses, f"{len(losses)} of {len(known)} metrics"


HEAD = ("metric", "decoding", "before", "after", "change, 95 % interval")


def demo() -> str:
    """Legality, skill and exactness, and the losses in one line."""
    metrics, losses, count = judged()
    three = {key: ROWS[key] for key in (("policy", "best_legal"), ("policy", "skill"), ("environment", "exact"))}
    said = "; ".join(f"{lost(row, metrics)}, {row['mode']} {change(row)}" for row in losses)
    link = "[all rows](docs/results.md#the-demo)"
    body = table(HEAD, "llrrl", rows_of(metrics, three))
    return f"{body}\n\nSignificant losses, {count}: {said or 'none'} ({link})."


def demo_whole() -> str:
    metrics, losses, count = judged()
    rows = [*rows_of(metrics, ROWS), (f"**significant losses** ({count})", "", "", "", "")]
    rows += [(lost(row, metrics), row["mode"], shown(row), shown(row, "after"), change(row)) for row in losses]
    return table(HEAD, "llrrl", rows)


def earned() -> str:
    """What players and cheats earn, and earned."""
    report = read("players")
    rows = [
        (name, number(report["before"][name]["reward"]), number(now["reward"])) for name, now in report["now"].items()
    ]
    return table(("who writes", "before", "now"), "lrr", rows)


def figures() -> str:
    """What was measured, a row each."""
    step, learning, scoring, controls = map(read, ("step", "learning", "scoring", "controls"))
    saving, kills, faults, mining = map(read, ("checkpointing", "kill_resume", "faults", "mining"))
    generation, large = read("generation"), read("step_124m")
    supervised, exact = read("supervised"), read("exact")
    seconds = step["seconds_per_step"]
    scored = [each["rows_per_second_median"] for name, each in scoring["results"].items() if "without" not in name]
    rounds = [100 * each for each in controls["overhead_of_each_round"]]
    size = saving["sizes"]["nano"]
    recovered = faults["recovery on"]
    mined = {each["reward"]: each for each in mining["results"]}["graduated"]
    shares = [100 * mined[side]["groups/informative"] for side in ("plain", "mined")]
    learned = " and ".join(f"{each['speedup']:.1f} times ({each['shape']})" for each in learning["results"])
    trees = " and ".join(f"{supervised[task]['speedup']:.1f} times ({task})" for task in ("policy", "environment"))
    step_of = exact["seconds_per_step"]
    positions = generation["results"][-1]
    rows = [
        ("step", "an entire step, beside stock TRL's", f"{seconds['ours']:.2f} s against {seconds['stock']:.1f} s"),
        ("learning", "the learning pass on shared prefixes, beside TRL's", learned),
        (
            "exact",
            "a step with the exact gradient (2 completions a prompt), beside sampled GRPO (16) at equal prompts",
            f"{step_of['exact']:.1f} s against {step_of['sampled']:.1f} s",
        ),
        ("exact", "what its cost grows with, in powers of the number of legal moves", f"{exact['exponent']:.2f}"),
        ("supervised", "rows a second of supervised training on shared trees, beside padded lines", trees),
        ("scoring", "completions scored a second on one core", f"{min(scored):,} to {max(scored):,}"),
        (
            "controls",
            "what the trainer's controls add to a step",
            f"{100 * controls['overhead']:+.1f} % ({min(rounds):+.1f} to {max(rounds):+.1f} in {len(rounds)} rounds)",
        ),
        ("checkpointing", "share of training time spent on checkpoints", f"{size['checkpoint_share_percent']:.2f} %"),
        ("checkpointing", "share spent on snapshots in memory", f"{size['snapshot_share_percent']:.2f} %"),
        (
            "kill_resume",
            "runs lost to random SIGKILLs",
            f"{len(kills['lost'])} of {kills['runs']}, in {kills['kills']} kills",
        ),
        ("faults", "transient faults recovered from", f"{recovered['recovered']} of {recovered['faults']}"),
        ("mining", "groups whose rewards differ, without and with mining", "{:.0f} % and {:.0f} %".format(*shares)),
        (
            "generation",
            "positions a second on two cores, by self-play and with every move valued",
            f"{positions['self_play']['per_second']:.0f} and {positions['every_move']['per_second']:.0f}",
        ),
        (
            "step_124m",
            "one step of 124M parameters on a CPU, memory",
            f"{large['seconds']:.0f} s, {large['step']['perf/memory_gb']:.1f} GB",
        ),
    ]
    return table(("what", "figure", "file"), "lll", [(what, figure, f"`{name}.json`") for name, what, figure in rows])


def rollouts() -> str:
    """Seconds of a sampling pass by each way."""
    ways = ("generate", "native", "drafted", "vllm")
    rows = []
    for name in ("rollouts", "rollouts_vllm", "rollouts_vllm_124m"):
        for each in read(name)["results"]:
            if each["kind"] in ("policy", "environment"):
                seconds = [f"{each['seconds'][way]:.2f}" if way in each["seconds"] else "" for way in ways]
                rows.append((f"`{name}.json`", each["kind"], f"{each['prompts']} × {each['samples']}", *seconds))
    head = ("file", "task", "prompts × samples", "`generate`, s", "native, s", "drafted, s", "vLLM, s")
    return table(head, "lllrrrr", rows)


def of_switches(name: str) -> str:
    """A row of each combination; speeds are multiples of that with everything off."""
    switches = ("share_prefixes", "activation_checkpointing", "torch_compile", "bf16")
    results, rows = read(name)["results"], []
    combinations = [(name.split(" + "), row) for name, row in results.items()]
    for on, row in sorted(combinations, key=lambda each: [each[0].count(s) != (s == switches[0]) for s in switches]):
        speed = results["none"]["seconds_per_step"] / row["seconds_per_step"]
        cells = [f"{row['seconds_per_step']:.3g}", f"{speed:.2f}", f"{row['first_step']['step_time']:.3g}"]
        cells += [f"{row['memory_gb']:.2f}", f"{row['graphs']:.0f}" if "graphs" in row else ""]
        rows.append([*("on" if switch in on else "" for switch in switches), *cells])
    return table((*switches, "s a step", "speed", "first step, s", "GB", "graphs"), "llllrrrrr", rows)


README = {"demo": demo}
REWARDS = {"players": earned}
TABLES = {
    "demo-whole": demo_whole,
    "figures": figures,
    "switches": lambda: of_switches("switches"),
    "switches_124m": lambda: of_switches("switches_124m"),
    "rollouts": rollouts,
}
