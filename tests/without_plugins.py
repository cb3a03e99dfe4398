"""Delete each plug-in and its test in turn, in a copy of the tree: the other fast tests must stay green.

python -m tests.without_plugins [NAME ...]
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "rookworld_trl" / "plugins"
# What the core does, the other plug-ins, and the recipe: it parses, and trains a tiny model.
FAST = (
    *("tests/plugins", "tests/settings", "tests/training/test_trainer.py", "tests/training/test_loss.py"),
    *("tests/training/test_kl_in_training.py", "tests/training/test_reward_metrics.py", "tests/test_doctor.py"),
)


def delete(name: str, tree: Path) -> None:
    """The plug-in's file, its test, and the statements of recipes that name it or its class, or what these make."""
    file = tree / "rookworld_trl" / "plugins" / f"{name}.py"
    names = set(re.findall(r"^(?:class|def) (\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    file.unlink()
    (tree / "tests" / "plugins" / f"test_{name}.py").unlink(missing_ok=True)
    for recipe in (tree / "recipes").glob("*.py"):
        left = Without(f"rookworld_trl.plugins.{name}", names).visit(ast.parse(recipe.read_text(encoding="utf-8")))
        recipe.write_text(ast.unparse(left), encoding="utf-8")


class Without(ast.NodeTransformer):
    """Drops statements that begin with one of these names, or import from a module that is gone."""

    def __init__(self, module: str, names: set[str]) -> None:
        self.module, self.names = module, set(names)

    def generic_visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.stmt):
            if isinstance(node, ast.ImportFrom) and node.module == self.module:
                return None
            own = [each for each in ast.iter_child_nodes(node) if not isinstance(each, ast.stmt)]
            if {each.id for part in own for each in ast.walk(part) if isinstance(each, ast.Name)} & self.names:
                if isinstance(node, ast.Assign):  # a name that is made from itself stays
                    made = {target.id for target in node.targets if isinstance(target, ast.Name)}
                    self.names |= made - {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
                return None
        return super().generic_visit(node)


def main(*names: str) -> int:
    failed = []
    for name in names or sorted(path.stem for path in PLUGINS.glob("[a-z]*.py")):
        with tempfile.TemporaryDirectory(prefix="without-") as parent:
            tree = Path(parent, "tree")
            shutil.copytree(
                ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "results", "__pycache__")
            )
            delete(name, tree)
            command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not long", *FAST]
            done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=False)
            print(f"without {name}: {'green' if done.returncode == 0 else 'RED'}", flush=True)
            failed += [name] if done.returncode else []
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
