"""The package as its imports draw it: parts, what each imports, and the map of them in CONTRIBUTING.md."""

import ast
import functools
import inspect
from dataclasses import fields
from pathlib import Path

import rookworld_trl
from rookworld_trl.plugins import offered
from rookworld_trl.training import Plugin
from tests.support.tables.cells import table

ROOT = Path(rookworld_trl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def part_of(module: str) -> str:
    """`rookworld_trl.training.kl` -> training."""
    return module.split(".")[1] if "." in module else "__init__"


def name_of(file: Path) -> str:
    parts = ("rookworld_trl", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def all_imports(file: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """The package's own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return frozenset(name for name in found if name.split(".")[0] == "rookworld_trl")


def parts() -> dict[str, set[str]]:
    """Each part of the package and the others that it imports; what others stand on comes first."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        mine = part_of(name_of(file))
        graph.setdefault(mine, set()).update({part_of(name) for name in imports(file)} - {mine})
    height: dict[str, int] = {}

    def high(part: str) -> int:
        if part not in height:
            height[part] = 0  # a circle would end here; a test sees it
            height[part] = 1 + max(map(high, graph[part]), default=0)
        return height[part]

    return {part: graph[part] for part in sorted(graph, key=lambda part: (high(part), part))}


def _first_line(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split()).replace("|", "\\|")


def verbs() -> str:
    """What a step asks of a plug-in, as a table."""
    rows = []
    for name, verb in vars(Plugin).items():
        if inspect.isfunction(verb) and not name.startswith("_"):
            given = ", ".join(list(inspect.signature(verb).parameters)[1:])
            rows.append((f"`{name}({given})`", _first_line(verb.__doc__)))
    return table(("verb", "when, and what for"), "ll", rows)


def plugins() -> str:
    """The plug-ins as a table."""
    rows = []
    for file in sorted((ROOT / "plugins").glob("[a-z]*.py")):
        classes = [cls for cls in offered() if cls.__module__ == name_of(file)]
        keys = ", ".join(f"`{each.name}`" for cls in classes for each in fields(cls) if each.init)
        about = _first_line(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
        rows.append(f"| [`{file.stem}`](../rookworld_trl/plugins/{file.name}) | {about} | {keys} |")
    return "\n".join(["| file | what it does | keys |", "|---|---|---|", *rows])


def map_of_the_house() -> str:
    """The parts as a table, from the ground up."""
    rows = []
    for part, others in parts().items():
        if part == "__init__":
            continue
        folder = ROOT / part
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        about = _first_line(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
        stands_on = ", ".join(f"`{other}`" for other in sorted(others - {"__init__"}))
        rows.append((f"`{part}/`" if folder.is_dir() else f"`{part}.py`", about, stands_on or "–"))
    return table(("part", "holds", "imports"), "lll", rows)
