"""The verifications: of RookWorld-LM 124M by their own recipes, of one batch learned by heart, and of a seed."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import verify
from recipes import grpo, verify_determinism

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_component_is_in_the_log(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model in place of 124M random weights."""
    monkeypatch.setattr(verify, "fresh", lambda folder: tiny_checkpoint)
    checks = verify.components(tmp_path)["checks"]
    assert checks == dict.fromkeys(checks, True)


@pytest.mark.long
@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize("name", verify.RUNS)
def test_at_real_size(name: str, tmp_path: Path) -> None:
    """124M random weights and nano's real ones on this machine's CPU; `benchmarks/results/verify.json` has one run."""
    assert verify.main(["--only", name, "--output", str(tmp_path / "verify.json")]) == 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_one_batch_is_learned_by_heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts to a reward of 0.9 or more, near the highest level."""
    monkeypatch.chdir(ROOT)
    config = "recipes/nano/grpo/config_overfit_one_batch.yaml"
    grpo.main(["--config", config, "--output_dir", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards[0] < 0.7
    assert max(rewards[-10:]) >= 0.9, [round(reward, 3) for reward in rewards[::10]]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(capfd: pytest.CaptureFixture[str]) -> None:
    small = "--model nano --max_steps 1 --num_generations 2 --per_device_train_batch_size 20 --max_completion_length 80"
    words = [*small.split(), "--use_cpu", "true", "--bf16", "false", "--reward", "continuous"]
    assert verify_determinism.main(words) == 0
    first, second = re.findall(r"^(?:first|second) run +(\w{64})$", capfd.readouterr().out, flags=re.MULTILINE)
    assert first == second
    assert first != verify_determinism.weights_of([*words, "--seed", "7"])
