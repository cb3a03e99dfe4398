"""The single-batch check: four prompts, learned by heart to a reward of 0.9 or more, near the highest level."""

import json
from pathlib import Path

import pytest

from recipes import grpo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_one_batch_is_learned_by_heart(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = "recipes/nano/grpo/config_overfit_one_batch.yaml"
    grpo.main(["--config", config, "--output_dir", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards[0] < 0.7
    assert max(rewards[-10:]) >= 0.9, [round(reward, 3) for reward in rewards[::10]]
