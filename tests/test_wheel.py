"""Two of the README's readers, each in an environment of its own: who uses TRL has the built wheel, runs the doctor and
the example; who plays chess has a clone, trains and plays. The third, with a GPU, is tests/recipes/test_users_way.py's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.documents import README, ROOT, blocks
from tests.test_docs import workplace  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def bare(folder: Path) -> Path:
    """Programs of a new environment that has what the package depends on, but not the package."""
    venv.create(folder)
    packages = next(folder.glob("lib/*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # an editable install is not on it
    return folder / "bin"


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--quiet", "--no-deps", "--no-index"]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment that has the wheel, and not the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "rookworld_trl", folder / "source" / "rookworld_trl")  # a build leaves files beside it
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-build-isolation", "-w", folder, folder / "source")
    programs = bare(folder / "venv")
    (wheel,) = folder.glob("*.whl")
    pip("--python", programs / "python", "install", wheel)
    return programs


def run(command: list[str | Path], folder: Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=without, input=typed, capture_output=True, text=True, timeout=800)


def test_the_wheel_measures_a_setup_and_runs_the_example(installed: Path, workplace: Path) -> None:  # noqa: F811
    where = run([installed / "python", "-c", "import rookworld_trl; print(rookworld_trl.__file__)"], workplace)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent)
    rows = workplace / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"P: {'a' * count}"}) + "\n" for count in range(1, 9)))
    words = ["--model", "openai-community/gpt2", "--dataset", rows, "--max_completion_length", "4", "--use_cpu", "true"]
    words += ["--bf16", "false", "--beta", "0.01", "--per_device_train_batch_size", "8", "--num_generations", "2"]
    measured = run([installed / "rookworld-doctor", *words], workplace)
    assert measured.returncode == 1, measured.stderr
    assert [line for line in measured.stdout.splitlines() if line.startswith("padding ") and line.endswith("FAILS")]
    (code,) = blocks(README.read_text(), "python")
    example = run([installed / "python", "-c", code.replace("max_steps=100", "max_steps=2")], workplace)
    assert example.returncode == 0, example.stderr
    assert "Significant losses: none among 1 metrics." in example.stdout


def test_a_clone_trains_and_plays(tmp_path: Path) -> None:
    """The README's three lines as they are, but for steps and items; `make setup` alone is done without a network."""
    for name in ("recipes", "accelerate_configs", "rookworld_trl"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = bare(tmp_path / ".venv")
    pip("--python", programs / "python", "install", "--no-build-isolation", "-e", tmp_path)
    starter = f"#!{programs}/python\nfrom accelerate.commands.accelerate_cli import main\nmain()\n"
    (programs / "accelerate").write_text(starter)
    (programs / "accelerate").chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()

    (lines,) = [block for block in blocks(README.read_text(), "bash") if "make demo" in block]
    small = 'make demo ARGS="--max_steps 2 --eval_policy_items 8 --eval_environment_items 8"'
    done = run(["bash", "-ec", lines.replace("make demo", small)], tmp_path, "uci\nposition startpos\ngo\nquit\n")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 planned steps were made" in done.stdout
    assert re.search(r"^uciok$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^bestmove [a-h][1-8][a-h][1-8]$", done.stdout, flags=re.MULTILINE)
    assert "<svg" in (tmp_path / "runs" / "demo" / "report.html").read_text()
