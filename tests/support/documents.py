"""The repository's Markdown pages as the tests read them, and the tables in them that are generated.

    python -m tests.support.documents     writes those tables (`make docs`), and the schemas of recipes

What was measured stands between `<!-- table: NAME -->` and `<!-- end -->` and comes from the files under
`benchmarks/results/`, by the functions of `tests/support/tables/`, a file for each page. Those of `docs/recipes.md`
come from the configuration classes. A table of fields stands between `<!-- fields of CLASS: PATTERNS -->` and
`<!-- end -->`. It holds the fields that the class adds or whose default it changes, in their order, as far as a pattern
names them and no earlier table of the class does; `@changed` names those of a class above.
"""

import functools
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from recipes.grpo import RunConfig
from recipes.sft import SFTRecipe
from rookworld_trl.chess.prompts import PromptOptions
from rookworld_trl.chess.sources import DataOptions
from rookworld_trl.plugins import offered
from rookworld_trl.settings.terminal import TerminalOptions
from rookworld_trl.training import RookWorldGRPOConfig
from rookworld_trl.training.supervised import SupervisedConfig
from tests.support.house import map_of_the_house, plugins, verbs
from tests.support.schema import FILES, schema
from tests.support.tables import cells, evidence, exact_gradient, results, start_or_rl

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ABOUT = [README, CONTRIBUTING, ROOT / "CHANGELOG.md"]
PAGES = [*ABOUT, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))]
FIELDS_PAGE = ROOT / "docs" / "recipes.md"
GROUPS = (RunConfig, PromptOptions, DataOptions, TerminalOptions, RookWorldGRPOConfig, SFTRecipe, SupervisedConfig)
GROUPS += (*offered(),)
CLASSES = {cls.__name__: cls for cls in GROUPS}

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
_RESULTS = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
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


def inline_commands(text: str) -> list[str]:
    """Commands in the running text of a page."""
    programs = "accelerate launch|make|pip|python|rookworld-uci|rookworld-doctor"
    return re.findall(rf"`((?:{programs}) [^`…]+)`", prose(text))


def head(text: str) -> str:
    """The commands in the comments of a YAML file: what is set in by three columns, or follows a colon."""
    lines = [line[1:] for line in text.splitlines() if line.startswith("#")]
    shown = [line.strip() for line in lines if line.startswith("   ")]
    return "\n".join(shown + [code for line in lines for code in re.findall(r": (python recipes/.*)", line)])


def documented() -> dict[str, list[str]]:
    """Every command that the pages and the heads of recipes and of `accelerate_configs` show, with the places where
    it stands. What a target of make starts of the programs is among them."""
    found: dict[str, list[str]] = {}
    texts: list[tuple[Path, list[str]]] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        texts.append((page, [*blocks(text, "bash"), *inline_commands(text)]))
    for file in [*sorted(ROOT.glob("accelerate_configs/*.yaml")), *sorted(ROOT.glob("recipes/**/*.yaml"))]:
        texts.append((file, [head(file.read_text(encoding="utf-8"))]))
    for place, codes in texts:
        for words in (words for code in codes for words in commands(code)):
            if ":" in words[0]:
                continue  # a fragment of YAML
            for each in [words, *started_by_make(words)]:
                found.setdefault(shlex.join(without_quiet(each)), []).append(str(place.relative_to(ROOT)))
    return found


def without_quiet(words: list[str]) -> list[str]:
    return [word for word in words if word != "--quiet"]


@functools.cache
def dry_run(*words: str) -> str:
    """What a target would type."""
    command = ["make", "-n", *words[1:]]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def started_by_make(words: list[str]) -> list[list[str]]:
    """The package's programs that a target starts, as `make -n` shows them."""
    if words[0] != "make" or words[1:] in ([], ["help"]):
        return []
    lines = [each for each in commands(dry_run(*words)) if any(word.startswith("recipes/") for word in each)]
    return [[Path(each[0]).name, *each[1:]] for each in lines]


def shown(default: Any) -> str:
    """A default as a recipe would write it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"{default:g}" if isinstance(default, float) else str(getattr(default, "value", default))


def own_fields(cls: type) -> list[Field[Any]]:
    """The fields that a class defines itself, new or with another default."""
    return [field for field in fields(cls) if field.init and field.name in cls.__annotations__]


def row(cls: type, field: Field[Any]) -> tuple[str, str, str]:
    """A field as a row of a table."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    above = inherited(cls)
    was = f" (TRL: `{shown(above[field.name])}`)" if above.get(field.name, default) != default else ""
    help = field.metadata.get("help", "").replace("|", "\\|").replace("%%", "%")
    return f"`{field.name}`", f"`{shown(default)}`{was}", help


def inherited(cls: type) -> dict[str, Any]:
    """Names and defaults of the fields of the classes above."""
    return {field.name: field.default for base in cls.__bases__ if is_dataclass(base) for field in fields(base)}


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
        return "\n".join([head, cells.table(("key", "default", "meaning"), "lll", rows), "", end])

    text = _TABLE.sub(table, text)
    missing = [f"{name}.{field.name}" for name, fields_left in left.items() for field in fields_left]
    if missing:
        raise ValueError(f"{FIELDS_PAGE.name}: no table takes {', '.join(missing)}; name them in a `fields of` line")
    return text


def with_tables(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables of what was measured written from the results.

    Raises:
        ValueError: a block that no function writes, or a function without its block.
    """
    named = _RESULTS.findall(text)
    if sorted(name for _, name, *_ in named) != sorted(tables):
        raise ValueError(f"blocks of tables {[name for _, name, *_ in named]}, functions for {list(tables)}")
    return _RESULTS.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n\n{match[3]}", text)


MEASURED = {
    README: results.README,
    CONTRIBUTING: {"map": map_of_the_house},
    ROOT / "docs" / "plugins.md": {"verbs": verbs, "plugins": plugins},
    ROOT / "docs" / "evidence.md": evidence.TABLES,
    ROOT / "docs" / "evidence-tables.md": evidence.APPENDIX | start_or_rl.APPENDIX | exact_gradient.APPENDIX,
    ROOT / "docs" / "exact-gradient.md": exact_gradient.TABLES,
    ROOT / "docs" / "results.md": results.TABLES,
    ROOT / "docs" / "rewards.md": results.REWARDS,
    ROOT / "docs" / "start-or-rl.md": start_or_rl.TABLES,
}
GENERATED: dict[Path, Callable[[str], str]] = {FIELDS_PAGE: with_fields}
GENERATED |= {page: partial(with_tables, tables=tables) for page, tables in MEASURED.items()}

if __name__ == "__main__":
    for page, rewrite in GENERATED.items():
        page.write_text(rewrite(page.read_text(encoding="utf-8")), encoding="utf-8")
    for file, classes in FILES.items():
        file.write_text(schema(classes), encoding="utf-8")
