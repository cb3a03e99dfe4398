"""What the code imports is declared in pyproject.toml, and is not merely there because another package brought it."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.house import all_imports

ROOT = Path(__file__).parents[1]
OURS = {"benchmarks", "recipes", "rookworld_trl", "tests"}
# Extras whose packages are imported only where somebody asks for what they do.
OPTIONAL = {"rookworld_trl": {"sft"}, "recipes": {"sft"}, "benchmarks": {"test", "vllm"}, "tests": {"test", "vllm"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def same(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(folder: str) -> set[str]:
    extras = [PROJECT["optional-dependencies"][extra] for extra in OPTIONAL[folder]]
    lines = [line for lines in (PROJECT["dependencies"], *extras) for line in lines]
    return {same(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]


@pytest.mark.parametrize("folder", sorted(OURS))
def test_what_is_imported_is_declared(folder: str) -> None:
    places, known = packages_distributions(), declared(folder)
    found = {module for file in (ROOT / folder).rglob("*.py") for module in all_imports(file)}
    foreign = found - OURS - set(sys.stdlib_module_names)
    assert not {name for name in foreign if not {same(each) for each in places.get(name, [name])} & known}
