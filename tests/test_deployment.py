"""The Dockerfile, which a job of continuous integration builds, and the Slurm script, run against stand-ins."""

import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from rookworld_trl.training import RookWorldGRPOConfig

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "recipes/rookworld-lm-124m/multi_node.slurm"


def test_the_dockerfile_installs_what_make_needs_and_runs_it() -> None:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    instructions = [tuple(line.split(None, 1)) for line in joined if line.strip()]  # (instruction, arguments)
    install, *runs = [text for name, text in instructions if name == "RUN"]
    packages = install.split("--no-install-recommends")[1].split("&&")[0].split()
    compilers = {"g++", "gcc", "python3-dev"}  # of torch.compile: for a CPU's kernels, for a GPU's launchers
    assert {"make", "python3", "python3-venv", "stockfish"} | compilers <= set(packages)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"make setup"} == set(runs)
    assert dict(instructions)["ENTRYPOINT"] == '["make"]'
    assert {"setup", dict(instructions)["CMD"].strip('[]"')} <= targets
    for sources in (text.split()[:-1] for name, text in instructions if name == "COPY"):
        assert all((ROOT / source).exists() for source in sources), sources
    assert {".venv", ".git", "runs", "data"} <= set((ROOT / ".dockerignore").read_text().split())


def test_slurm_starts_every_machine_with_its_rank(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and for accelerate, which prints its arguments."""
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
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    command = ["bash", str(SLURM), "--max_steps", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
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
