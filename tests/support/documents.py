"""The repository's Markdown pages as the tests read them, and the tables in them that are generated.

    python -m tests.support.documents     writes those tables, and the programs' `--help` (`make docs`)

The tables of `docs/results.md` come from the files under `benchmarks/results/`, those of `docs/recipes.md` from the
configuration classes. A table of fields stands between `<!-- fields of CLASS: PATTERNS -->` and `<!-- end -->`. It
holds the fields that the class adds or whose default it changes, in their order, as far as a pattern names them and no
earlier table of the class does; `@changed` names those of a class above.
"""

import json
import os
import re
import shlex
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, Field, fields
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import switches
from recipes import evaluate, grpo, play, sft
from recipes.grpo import RunConfig
from recipes.sft import SFTRecipe
from rookworld_trl.data.prompts import PromptOptions
from rookworld_trl.data.sources import DataOptions
from rookworld_trl.help import WIDTH, shown, stamp, stored
from rookworld_trl.terminal import TerminalOptions
from rookworld_trl.training import RookWorldGRPOConfig
from rookworld_trl.training.supervised import SupervisedConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))]
FIELDS_PAGE = ROOT / "docs" / "recipes.md"
FIGURES_PAGE = ROOT / "docs" / "results.md"
GROUPS = (RunConfig, PromptOptions, DataOptions, TerminalOptions, RookWorldGRPOConfig, SFTRecipe, SupervisedConfig)
CLASSES = {cls.__name__: cls for cls in GROUPS}
PROGRAMS = {
    "recipes/grpo.py": grpo.main,
    "recipes/sft.py": sft.main,
    "recipes/evaluate.py": evaluate.main,
    "recipes/play.py": play.main,
}

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
_TABLE = re.compile(r"(<!-- fields of (\w+): (.*?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language, without their indentation."""
    found = [match.groups() for match in _FENCE.finditer(text)]
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, name, code in found if name == language]


def languages(text: str) -> set[str]:
    return {match[2] for match in _FENCE.finditer(text)}


def prose(text: str) -> str:
    """The text without its code blocks."""
    return _FENCE.sub("", text)


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block; continued lines are joined, `&&` and `;` part commands."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";")), len(words))
            found += [words[:end]] if words[:end] else []
            words = words[end + 1 :]
    return found


def own_fields(cls: type) -> list[Field[Any]]:
    """The fields that a class defines itself, new or with another default."""
    return [field for field in fields(cls) if field.name in cls.__annotations__]


def row(cls: type, field: Field[Any]) -> str:
    """A field as a row of a table."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    above = inherited(cls)
    was = f" (TRL: `{shown(above[field.name])}`)" if above.get(field.name, default) != default else ""
    help = field.metadata.get("help", "").replace("|", "\\|")
    return f"| `{field.name}` | `{shown(default)}`{was} | {help} |"


def inherited(cls: type) -> dict[str, Any]:
    """Names and defaults of the fields of the classes above."""
    return {field.name: field.default for base in cls.__bases__ if base is not object for field in fields(base)}


def with_fields(text: str) -> str:
    """The page with its tables of fields written from the classes.

    Raises:
        ValueError: a field that no table takes.
    """
    left = {name: own_fields(cls) for name, cls in CLASSES.items()}

    def table(match: re.Match[str]) -> str:
        head, name, patterns, end = match.groups()
        above = inherited(CLASSES[name])

        def named(field: Field[Any]) -> bool:
            return any(
                field.name in above if pattern == "@changed" else fnmatchcase(field.name, pattern)
                for pattern in patterns.split()
            )

        rows = [row(CLASSES[name], field) for field in left[name] if named(field)]
        left[name] = [field for field in left[name] if not named(field)]
        return "\n".join([head, "| key | default | meaning |", "|---|---|---|", *rows, "", end])

    text = _TABLE.sub(table, text)
    missing = [f"{name}.{field.name}" for name, fields_left in left.items() for field in fields_left]
    if missing:
        raise ValueError(f"{FIELDS_PAGE.name}: no table takes {', '.join(missing)}; name them in a `fields of` line")
    return text


def _read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def figures() -> list[str]:
    """What was measured, a row each."""
    step, learning, scoring, controls = map(_read, ("step", "learning", "scoring", "controls"))
    saving, kills, faults, mining = map(_read, ("checkpointing", "kill_resume", "faults", "mining"))
    generation, large = _read("generation"), _read("step_124m")
    supervised, exact = _read("supervised"), _read("exact")
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
    table = [f"| {what} | {figure} | `{name}.json` |" for name, what, figure in rows]
    return ["| what | figure | file |", "|---|---|---|", *table]


def rollouts() -> list[str]:
    """Seconds of a sampling pass by each way."""
    ways = ("generate", "native", "drafted", "vllm")
    rows = []
    for name in ("rollouts", "rollouts_vllm", "rollouts_vllm_124m"):
        for each in _read(name)["results"]:
            if each["kind"] in ("policy", "environment"):
                seconds = [f"{each['seconds'][way]:.2f}" if way in each["seconds"] else "" for way in ways]
                cells = [f"`{name}.json`", each["kind"], f"{each['prompts']} × {each['samples']}", *seconds]
                rows.append("| " + " | ".join(cells) + " |")
    head = "| file | task | prompts × samples | `generate`, s | native, s | drafted, s | vLLM, s |"
    return [head, "|---|---|---|---:|---:|---:|---:|", *rows]


def with_figures(text: str) -> str:
    """The page with its tables of figures written from the measurements."""
    tables = {"figures": figures(), "rollouts": rollouts()}
    tables |= {name: switches.table(_read(name)["results"]).splitlines() for name in ("switches", "switches_124m")}
    for name, table in tables.items():
        body = "\n".join([f"<!-- {name} -->", "", *table, "", "<!-- end -->"])
        text = re.sub(f"<!-- {name} -->.*?<!-- end -->", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def help_of(program: str) -> str:
    """What a program's `--help` prints where nothing is stored, under the versions that it was made for."""
    argv, columns = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = [Path(program).name], str(WIDTH)
    try:
        with redirect_stdout(StringIO()) as text, suppress(SystemExit):
            PROGRAMS[program](["--help"])
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return f"{stamp()}\n{text.getvalue()}"


GENERATED = {FIELDS_PAGE: with_fields, FIGURES_PAGE: with_figures}

if __name__ == "__main__":
    for page, rewrite in GENERATED.items():
        page.write_text(rewrite(page.read_text(encoding="utf-8")), encoding="utf-8")
    for program in PROGRAMS:
        stored(ROOT / program).parent.mkdir(exist_ok=True)
        stored(ROOT / program).write_text(help_of(program), encoding="utf-8")
