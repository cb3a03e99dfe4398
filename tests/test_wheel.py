"""The built wheel in an environment of its own, as one who installs it has it: the doctor, and the README's example."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.documents import README, ROOT, blocks
from tests.test_docs import workplace  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment that has the wheel, and from this one what it depends on, but not the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "rookworld_trl", folder / "source" / "rookworld_trl")  # a build leaves files beside it
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"], check=True
    )
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    packages = next((folder / "venv").glob("lib/*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # an editable install is not on it
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return python.parent


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=without, capture_output=True, text=True, timeout=240)


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
