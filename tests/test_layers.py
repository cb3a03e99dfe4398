"""The layout as a test: imports point down, nothing goes in a circle, files stay short, and there is one trainer."""

import re
from graphlib import TopologicalSorter

from trl import GRPOTrainer

from rookworld_trl.checkpointing.trainer import DurableGRPOTrainer
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.support.house import FILES, ROOT, all_imports, imports, name_of, parts

# Which parts of the package a part may import, beside itself. What stands in no folder is its own part.
MAY_IMPORT = {
    "files": set(),
    "ranks": set(),
    "memory": set(),
    "settings": set(),
    "modeling": set(),
    "checkpointing": {"modeling", "files", "ranks", "settings"},
    "doctor": {"training", "modeling", "settings"},
    "measuring": {"files"},
    "chess": {"measuring", "modeling", "settings"},
    "training": {"modeling", "checkpointing", "files", "memory", "ranks", "settings"},
    "plugins": {"training", "checkpointing", "modeling", "files", "memory", "ranks", "settings"},
    "reports": {"measuring", "files", "settings", "__init__"},  # the package's version
    "__init__": set(),
}


def test_imports_point_down_and_no_part_may_import_what_it_does_not() -> None:
    """What a layer may see is what it needs: a line that was drawn wider is an invitation."""
    assert {part: others for part, others in parts().items() if others != MAY_IMPORT[part]} == {}
    assert parts().keys() == MAY_IMPORT.keys()
    TopologicalSorter(MAY_IMPORT).prepare()  # no two stand on each other


def test_the_package_imports_nothing_that_stands_around_it() -> None:
    around = {"recipes", "benchmarks", "tests"}
    assert {name_of(file): found for file in FILES if (found := all_imports(file) & around)} == {}


def test_nothing_imports_in_a_circle() -> None:
    """Nor for the sake of a type alone. What a package's `__init__` imports for its users does not count."""
    TopologicalSorter({name_of(file): imports(file) for file in FILES if file.name != "__init__.py"}).prepare()


def test_no_file_holds_two_ideas() -> None:
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > 500} == {}


def test_the_main_path_is_readable_in_one_sitting() -> None:
    assert len((ROOT.parent / "recipes" / "grpo.py").read_text(encoding="utf-8").splitlines()) <= 165


def test_two_classes_stand_on_trls_trainer() -> None:
    assert RookWorldGRPOTrainer.__base__ is DurableGRPOTrainer
    assert GRPOTrainer in DurableGRPOTrainer.__bases__
    made = {name for file in FILES for name in re.findall(r"class (\w+)\(.*GRPOTrainer\b", file.read_text("utf-8"))}
    assert made == {"DurableGRPOTrainer", "RookWorldGRPOTrainer"}
