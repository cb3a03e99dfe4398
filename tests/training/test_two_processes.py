"""One global batch on one process and on two gives the same weights, KL, coefficient and advantages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

WORKER = Path(__file__).with_name("two_process_worker.py")
SETTINGS: list[dict[str, Any]] = [
    {"advantage_baseline": "adaptive", "kl_control": "multiplicative", "kl_target": 1e-4, "kl_interval": 1},
    {"use_gae": True, "kl_estimator": "exact", "gradient_accumulation_steps": 1},
    {"mining": True, "mining_rounds": 2, "task_sampling": {"a": {"temperature": 0.7}}},
    {"objective": "mixed", "scale_rewards": "group", "beta": 0.05, "gradient_accumulation_steps": 1},
]


def run(checkpoint: Path, output: Path, settings: dict[str, Any], processes: int) -> dict[str, Any]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(WORKER), str(checkpoint), str(output), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FutureWarning" not in done.stderr  # of the pinned versions, about nothing that a user could change
    return torch.load(output, weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=["baseline and control", "gae and exact", "mining and two temperatures", "exact and mixed"],
)
def test_two_processes_equal_one(
    policy: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "start"
    policy.save_pretrained(checkpoint)
    tiny_tokenizer.save_pretrained(checkpoint)
    one = run(checkpoint, tmp_path / "one", settings, 1)
    two = run(checkpoint, tmp_path / "two", settings, 2)
    assert len(one["log"]) == 3
    for alone, together in zip(one["log"], two["log"], strict=True):
        assert alone.keys() == together.keys()
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
    start = policy.state_dict()
    moved = max((one["weights"][name] - start[name]).abs().max().item() for name in start)
    apart = max((one["weights"][name] - two["weights"][name]).abs().max().item() for name in start)
    assert moved > 1e-3
    assert apart < 1e-5
