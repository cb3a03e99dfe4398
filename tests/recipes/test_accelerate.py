"""The accelerate configurations say what they mean to accelerate itself, and two processes on the CPU really train."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from rookworld_trl.modeling.loading import NANO_FOLDER

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
EXPECTED = {"cpu", "cpu_x2", "rtx4090", "rtx4090_x2", "multi_gpu", "fsdp2", "deepspeed_zero2", "multi_node"}


def launched(path: Path, *more: str):
    """The arguments that `accelerate launch` goes by once it has read the file."""
    args = launch_command_parser().parse_args(["--config_file", str(path), *more, "recipes/grpo.py"])
    return _validate_launch_command(args)[0]


def test_every_file_is_there_and_every_key_is_accelerates_own() -> None:
    assert {path.stem for path in FILES} == EXPECTED
    known = {action.dest for action in launch_command_parser()._actions}
    for path in FILES:
        config = load_config_from_file(str(path))  # raises on unknown keys
        assert config.num_processes >= 1
        assert config.use_cpu == path.stem.startswith("cpu")
        settings = yaml.safe_load(path.read_text())
        assert set(settings) <= known | set(vars(config)), path
        for section in ("fsdp_config", "deepspeed_config", "dynamo_config"):
            unknown = set(settings.get(section, {})) - known
            assert not unknown, f"{path}: {section} holds keys that nobody reads: {unknown}"


def test_who_is_launched_how() -> None:
    args = {path.stem: launched(path) for path in FILES}
    assert {name for name, each in args.items() if each.multi_gpu} == {"cpu_x2", "multi_gpu", "multi_node"}
    assert {name for name, each in args.items() if each.use_cpu} == {"cpu", "cpu_x2"}
    several = {"cpu_x2": 2, "multi_gpu": 2, "fsdp2": 2, "deepspeed_zero2": 2, "multi_node": 16}
    assert {name: each.num_processes for name, each in args.items() if each.num_processes != 1} == several
    compiled = {(each.mixed_precision, each.dynamo_backend) for each in args.values() if not each.use_cpu}
    assert compiled == {("bf16", "inductor")}
    fsdp, zero = args["fsdp2"], args["deepspeed_zero2"]
    assert (int(fsdp.fsdp_version), fsdp.fsdp_transformer_layer_cls_to_wrap) == (2, "GPT2Block")
    assert (zero.use_deepspeed, int(zero.zero_stage)) == (True, 2)


def run(folder: Path, command: list[str], *machines: list[str], **changes: object) -> tuple[str, list[dict]]:
    """Run the recipe with the shipped model and rows for two steps, on several machines at once with what each adds to
    the command before its program.

    Returns:
        What was printed, and the lines of the metrics.
    """
    settings = {"output_dir": folder, "mix_env_ratio": 0.5, "max_steps": 2, "num_generations": 4, "save_steps": 1}
    settings |= {"per_device_train_batch_size": 8, "max_completion_length": 60, "learning_rate": 1e-3, "bf16": "false"}
    settings |= {"eval_policy_items": 2, "eval_environment_items": 2, "save_strategy": "steps", "report_to": "none"}
    settings |= {"rollout_backend": "transformers", "kl_stop_threshold": 1000, **changes}  # at such a rate it goes far
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    place = command.index("recipes/grpo.py") if machines else 0
    options = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    programs = [
        subprocess.Popen([sys.executable, *command[:place], *own, *command[place:], *words], **options, **pipes)
        for own in machines or [[]]
    ]
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda program: program.communicate(), programs))
    for program, (_, errors) in zip(programs, outputs, strict=True):
        assert program.returncode == 0, errors[-3000:]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return "".join(output for output, _ in outputs), [row for row in map(json.loads, lines) if "kl" in row]


def launcher(config: str, *program: str) -> list[str]:
    """Two processes of one thread each by a file of `accelerate_configs`, in float32.

    What a file has compiled goes through dynamo, but not through inductor's C++, which takes minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(port), "--mixed_precision", "no"]
    return [*command, *([] if config == "cpu_x2" else ["--dynamo_backend", "eager"]), *program]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_machines_and_shards_train_what_two_processes_do(tmp_path: Path) -> None:
    """multi_node.yaml by its own command, twice on this machine: they find each other and share every batch. And
    fsdp2.yaml's own settings over two CPU processes: FSDP2 itself, samples, checkpoint, evaluation, going on."""
    sharded = launcher("fsdp2", "-m", "tests.support.sharded_on_cpu")  # without `use_cpu` accelerate shards
    _, expected = run(tmp_path / "processes", launcher("cpu_x2", "recipes/grpo.py"), use_cpu="true")
    ranks = [["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--machine_rank", rank] for rank in "01"]
    multi_node = launcher("multi_node", "recipes/grpo.py")
    shown, by_machines = run(tmp_path / "machines", multi_node, *ranks, use_cpu="true")
    assert shown.count("held-out evaluation before training") == 1, "only one process may evaluate"
    _, by_shards = run(tmp_path / "sharded", sharded)
    for steps in (by_machines, by_shards):
        for name in ("reward", "kl", "loss", "grad_norm"):
            of_two = [row[name] for row in expected]
            assert [row[name] for row in steps] == pytest.approx(of_two, rel=1e-3, abs=1e-6), name
    start, plain, trained = (
        load_file(folder / "model.safetensors")
        for folder in (NANO_FOLDER, tmp_path / "processes" / "checkpoint", tmp_path / "sharded" / "checkpoint")
    )
    moved = max((trained[name] - start[name]).abs().max() for name in start)
    apart = max((trained[name] - plain[name]).abs().max() for name in start)
    assert moved > 1e-3 > 5 * apart  # Adam makes a step of the rate of gradients that are all rounding
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("machines", "sharded")]
    assert summaries[0]["identity"]["processes"] == 2
    assert {row["items"] for row in summaries[1]["metrics"]} == {2}
    _, steps = run(tmp_path / "sharded", sharded, max_steps=3, auto_resume="true")
    assert [row["step"] for row in steps] == [1, 2, 3]
