"""The layout as a test: imports point down, nothing goes in a circle, files stay short, and there is one trainer."""

import ast
from pathlib import Path

import pytest
from trl import GRPOTrainer

import rookworld_trl
from rookworld_trl.checkpointing.trainer import DurableGRPOTrainer
from rookworld_trl.training import RookWorldGRPOTrainer

ROOT = Path(rookworld_trl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Which parts of the package a part may import, beside itself. What stands in no folder is its own part.
MAY_IMPORT = {
    "files": set(),
    "ranks": set(),
    "tasks": set(),
    "engine": set(),
    "engine_pool": {"engine"},
    "help": set(),
    "config": {"help"},
    "terminal": {"config"},
    "alerts": set(),
    "rewards": {"tasks"},
    "modeling": set(),
    "checkpointing": {"modeling", "files", "ranks", "alerts", "config"},
    "play": {"tasks", "engine", "modeling"},
    "uci": {"play", "tasks", "modeling"},
    "doctor": {"training", "modeling"},
    "data": {"tasks", "engine", "engine_pool", "play", "modeling", "config", "terminal"},
    "training": {"modeling", "checkpointing", "files", "ranks", "config", "terminal", "alerts"},
    "evaluation": {"tasks", "engine", "play", "rewards", "modeling", "files", "terminal"},
    "reports": {"files", "config", "__init__"},  # the package's version
    "__init__": set(),
}


def part_of(module: str) -> str:
    """`rookworld_trl.training.kl` -> training."""
    return module.split(".")[1] if "." in module else "__init__"


def name_of(file: Path) -> str:
    parts = ("rookworld_trl", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def imports(file: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return {name for name in found if name.split(".")[0] == "rookworld_trl"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    mine = part_of(name_of(file))
    foreign = {part_of(name) for name in imports(file)} - {mine}
    assert foreign <= MAY_IMPORT[mine], f"{name_of(file)} imports {foreign - MAY_IMPORT[mine]}"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_no_part_may_import_what_it_does_not(part: str) -> None:
    """What a layer may see is what it needs: a line that was drawn wider is an invitation."""
    own = [file for file in FILES if part_of(name_of(file)) == part]
    assert {part_of(name) for file in own for name in imports(file)} >= MAY_IMPORT[part]


def test_nothing_imports_in_a_circle() -> None:
    """Nor for the sake of a type alone. What a package's `__init__` imports for its users does not count."""
    graph = {name_of(file): imports(file) for file in FILES if file.name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph.get(module, ())):
                visit(name, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_holds_two_ideas(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_main_path_is_readable_in_one_sitting() -> None:
    assert len((ROOT.parent / "recipes" / "grpo.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_two_classes_stand_on_trls_trainer() -> None:
    assert RookWorldGRPOTrainer.__base__ is DurableGRPOTrainer
    assert GRPOTrainer in DurableGRPOTrainer.__bases__
    names = {base.__name__ for file in FILES for base in classes(file)}
    assert names == {"DurableGRPOTrainer", "RookWorldGRPOTrainer"}


def classes(file: Path) -> list[type]:
    """Subclasses of TRL's GRPO trainer that a file defines."""
    module = __import__(name_of(file), fromlist=["*"]) if "GRPOTrainer" in file.read_text(encoding="utf-8") else None
    members = vars(module).values() if module is not None else ()
    made = [each for each in members if isinstance(each, type) and each.__module__ == name_of(file)]
    return [each for each in made if issubclass(each, GRPOTrainer)]
