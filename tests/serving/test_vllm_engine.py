"""Both vLLM recipes with vLLM itself, on the CPU; collected where vLLM is installed (`make test-vllm`)."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rookworld_trl.modeling.loading import NANO_FOLDER

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes/rookworld-lm-124m/grpo"
SMALL = {
    "model": "nano",
    "use_cpu": True,
    "vllm_max_model_length": 256,
    "mix_env_ratio": 0.25,
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "eval_policy_items": 4,
    "eval_environment_items": 4,
    "save_strategy": "no",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def environment() -> dict[str, str]:
    # The key-value cache in GiB. The server's endpoints for trainers are in its development mode.
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT)}


def train(environment: dict[str, str], recipe: str, **settings: object) -> list[dict[str, float]]:
    """Run a recipe; the lines of its metrics."""
    words = [word for key, value in {**SMALL, **settings}.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tests.support.vllm_on_cpu", "--config", str(RECIPES / f"{recipe}.yaml"), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "Traceback" not in done.stderr, done.stderr[-5000:]
    return [json.loads(line) for line in Path(str(settings["output_dir"]), "metrics.jsonl").read_text().splitlines()]


def test_an_engine_in_this_process_follows_the_policy(environment: dict[str, str], tmp_path: Path) -> None:
    """Its samples are those of the newest weights: with old ones, or an old head alone, the difference would grow."""
    learning = {"learning_rate": 1e-3, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_steps": 4}
    steps = train(environment, "config_vllm_colocate", output_dir=tmp_path / "run", **learning)
    assert len(steps) == 4
    assert steps[-1]["kl"] > 0.02, "the policy must have moved"
    differences = [step["sampling/sampling_logp_difference/mean"] for step in steps]
    print(f"mean |log-prob of vLLM in bfloat16 - of the loss| by step: {differences}")
    assert max(differences) < 0.01


@pytest.fixture
def server(environment: dict[str, str], tmp_path: Path) -> Iterator[int]:
    """A server by the command at the top of its recipe, in float32; its port."""
    header = (RECIPES / "config_vllm_server.yaml").read_text().replace("\\\n#", "")
    command = next(line for line in header.splitlines() if " vllm serve " in line)
    options = shlex.split(command.split(" vllm serve ")[1])[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The CPU build has no `vllm` program.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    program = [*server, "--model", str(NANO_FOLDER), "--port", str(port)]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*program, *options, "--dtype", "float32", "--max-model-len", "256"],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail(f"no server after five minutes: {log.read_text()[-5000:]}")
        yield port
    finally:
        process.terminate()
        process.wait(60)


def test_a_server_samples_what_the_loss_scores(environment: dict[str, str], server: int, tmp_path: Path) -> None:
    """vLLM is another implementation of GPT-2: in float32 its log-probs are those of the loss."""
    settings = {"bf16": False, "max_steps": 1, "vllm_server_port": server, "output_dir": tmp_path / "run"}
    (step,) = train(environment, "config_vllm_server", **settings)
    print(f"largest |log-prob of vLLM in float32 - of the loss|: {step['gates/sampler']:.2g}")
    assert step["gates/sampler"] < 1e-4
    assert step["gates/sampled_ids"] == 0
