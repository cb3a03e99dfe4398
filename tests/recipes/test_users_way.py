"""The user's way in order, each command as the pages have it but for sizes and steps: a bf16 checkpoint in RookWorld's
padded spelling from a Hub, measured, trained by the shipped launch file, killed, resumed, published, measured, and
loaded from where it was published. The Hub answers on loopback; the machine has no GPU, which the commands say."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rookworld_trl.modeling.loading import load
from tests.support.documents import ROOT
from tests.support.hub import TOKEN, Hub, serve

MODEL = "jrahn/RookWorld-LM-124M"
LAUNCH = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/rtx4090.yaml"]
# Sizes and steps: a small model, few items, two steps, each of them measured and saved.
SMALL = {"expected_parameters": "null", "num_generations": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
SMALL |= {"eval_steps": 1, "save_steps": 1, "eval_policy_items": 2, "eval_environment_items": 2, "eval_items": 2}
RECIPES = {"mixed": 10, "exact": 16}  # and the completions of their steps


@pytest.fixture
def hub(padded_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With the small model under RookWorld-LM's name, its weights in bf16 as llm.c exports them."""
    model, tokenizer = load(padded_checkpoint)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    with serve(monkeypatch) as server:
        server.add(MODEL, tmp_path / "start")
        yield server


class Machine:
    """Where the user types: a folder for runs, a cache, and a Hub."""

    def __init__(self, hub: Hub, folder: Path):
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
        self.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "cache")}
        self.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command in a session of its own, as a terminal's or a cluster's, so that a signal reaches all of it."""
        with (self.folder / "shown.txt").open("a") as shown:
            return subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=self.environment, stdout=shown, stderr=shown, text=True,
                start_new_session=True,
            )  # fmt: skip

    def run(self, *words: str) -> None:
        assert self.start(*words).wait() == 0, (self.folder / "shown.txt").read_text()[-4000:]

    def evaluate(self, output: str, *models: str, **more: str) -> list[dict]:
        options = [word for name, value in more.items() for word in (f"--{name}", value)]
        words = ["--model", *models, "--limit", "2", "--output", str(self.folder / output), *options]
        self.run("recipes/evaluate.py", *words)
        return json.loads((self.folder / output).read_text())["models"]

    def training(self, recipe: str) -> list[str]:
        settings = {**SMALL, "per_device_train_batch_size": RECIPES[recipe], "output_dir": self.folder / recipe}
        settings |= {"push_to_hub": "true", "hub_model_id": f"me/{recipe}", "hub_token": TOKEN, "use_cpu": "true"}
        words = [f"--{name}={value}" for name, value in settings.items()]
        return [*LAUNCH, "recipes/grpo.py", "--config", f"recipes/rookworld-lm-124m/grpo/config_{recipe}.yaml", *words]

    def killed_and_resumed(self, recipe: str, kill: signal.Signals) -> None:
        """Killed behind the checkpoint of the first of two steps, and started again to the end."""
        folder = self.folder / recipe
        program = self.start(*self.training(recipe))
        while not (folder / "checkpoint-1").exists():
            assert program.poll() is None, (self.folder / "shown.txt").read_text()[-4000:]
            time.sleep(0.05)
        os.killpg(program.pid, kill)
        assert program.wait() != 0
        assert not (folder / "finished.json").exists()
        self.run(*self.training(recipe), "--auto_resume")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_users_way(hub: Hub, tmp_path: Path) -> None:
    machine = Machine(hub, tmp_path)
    (before,) = machine.evaluate("before.json", MODEL)
    assert before["name"] == "RookWorld-LM-124M"

    with ThreadPoolExecutor() as pool:
        kills = {"mixed": signal.SIGTERM, "exact": signal.SIGKILL}
        list(pool.map(machine.killed_and_resumed, kills, kills.values()))
    for recipe in RECIPES:
        lines = [json.loads(line) for line in (tmp_path / recipe / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "kl" in line]
        summary = json.loads((tmp_path / recipe / "summary.json").read_text())
        assert [line["step"] for line in steps] == [1, 2]
        assert summary["steps"] == 2
        assert summary["identity"]["bf16"], "the launch file says so"
        assert steps[-1]["perf/compiled_graphs"] > 0, "and this"
        if recipe == "exact":
            assert min(line["exact/decided/policy"] for line in steps) > 0.5

    pushed = {recipe: hub.repositories[f"me/{recipe}"].branches["main"] for recipe in RECIPES}
    assert all(
        {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= set(files) for files in pushed.values()
    )
    commits = [commit for recipe in RECIPES for commit in hub.repositories[f"me/{recipe}"].commits]
    assert not any("Training in progress" in commit for commit in commits)
    written = [path.read_bytes() for each in RECIPES for path in (tmp_path / each).rglob("*") if path.is_file()]
    written += [data for files in pushed.values() for data in files.values()]
    assert not [data for data in written if TOKEN.encode() in data]
    assert "--hub_token=***" in pushed["exact"]["README.md"].decode()
    here, there, start = machine.evaluate(
        "after.json", str(tmp_path / "exact" / "checkpoint"), "me/exact", MODEL, baseline=str(tmp_path / "before.json")
    )
    assert here["results"] == there["results"]
    assert start["results"] == before["results"]
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, data in pushed["exact"].items():
        (folder / name).write_bytes(data)
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("P: 8/8").input_ids
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "exact" / "checkpoint").state_dict()
    assert all(torch.equal(weight, local[name]) for name, weight in trained.state_dict().items())
    begin = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    for recipe in RECIPES:
        end = AutoModelForCausalLM.from_pretrained(tmp_path / recipe / "checkpoint-2")
        moved = (end.transformer.wte.weight - begin.transformer.wte.weight).abs().max()
        assert 0 < moved < 0.01
