"""The tables of docs/results.md: speed and reliability, switches, rollouts."""

from tests.support.tables.cells import read, table
from tests.support.tables.readme import demo_whole


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


TABLES = {
    "demo-whole": demo_whole,
    "figures": figures,
    "switches": lambda: of_switches("switches"),
    "switches_124m": lambda: of_switches("switches_124m"),
    "rollouts": rollouts,
}
