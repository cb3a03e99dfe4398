"""The three verifications of RookWorld-LM 124M, by their own recipes at a small size: drift stops, all parts speak,
many passes over few prompts stay stable."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from benchmarks import verify
from recipes import grpo, verify_determinism
from rookworld_trl.chess import prompts
from rookworld_trl.training.gates import Bounds

VERIFY = Path(__file__).parents[2] / "recipes/rookworld-lm-124m/verify"
GATES = {"gates/padding", "gates/reference", "gates/sampled_ids", "gates/sampler"}
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tiny_checkpoint: Path, rows_file: Path, held_out: Dataset, tmp_path: Path, monkeypatch) -> Run:
    """Run a recipe of the folder, made small, and give back the lines of its metrics."""
    monkeypatch.setattr(prompts, "load_shipped", lambda split: held_out)
    small = {
        "model": tiny_checkpoint,
        "dataset": rows_file,
        "streaming": False,
        "best_move": "null",
        "output_dir": tmp_path / "run",
    }
    small |= {"num_generations": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    small |= {"max_completion_length": 12, "use_cpu": True, "bf16": False, "dataloader_num_workers": 0}

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        settings = {"config": VERIFY / name, **small, **changes}
        grpo.main([word for key, value in settings.items() for word in (f"--{key}", str(value))])
        return metrics(tmp_path)

    return run


def metrics(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "kl" in row]


def summary(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.slow
def test_every_component_is_in_the_log(run: Run, tmp_path: Path) -> None:
    steps = run("components.yaml")
    assert [row["step"] for row in steps] == [1, 2, 3]
    bounds = Bounds.for_precision(mixed=False)
    assert set(steps[0]) >= GATES
    assert not GATES & (set(steps[1]) | set(steps[2])), "the gates look at the first batch"
    assert steps[0]["gates/sampled_ids"] == 0
    assert max(steps[0]["gates/padding"], steps[0]["gates/sampler"]) <= bounds.logp
    assert steps[0]["gates/reference"] <= bounds.kl
    assert abs(steps[0]["kl"]) < 1e-6
    expected = {"kl/coefficient", "kl/sequence_p95", "entropy", "grad_norm", "learning_rate", "groups/informative"}
    expected |= {"perf/memory_gb", "perf/seconds_learning", "rollout/seconds_per_sample"}
    expected |= {"rewards/policy_reward_continuous/mean", "rewards/environment_reward_continuous/mean"}
    for row in steps:
        assert set(row) >= expected, expected - set(row)
        assert any(name.startswith("truth/") for name in row)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3)}
    for step in (1, 2, 3):
        table = pq.read_table(tmp_path / "run" / "completions" / f"completions_{step:05d}.parquet").to_pydict()
        assert len(table["completion"]) == 8
        assert {text[:3] for text in table["prompt"]} == {"P: ", "A: "}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_epochs_on_trained_weights_stay_in_bounds(run: Run, rows_file: Path, tmp_path: Path) -> None:
    """rookworld-nano on two positions of each task, all of them in every step."""
    rows_file.write_text("\n".join(rows_file.read_text().splitlines()[:4]) + "\n")
    steps = run(
        "epochs.yaml",
        model="nano",
        max_rows=4,
        max_steps=50,
        save_strategy="no",
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=80,
        learning_rate=2e-5,
    )
    assert len(steps) == 50
    assert not summary(tmp_path)["stop_reason"]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert max(row["kl"] for row in steps) < 0.5
    assert max(row["grad_norm"] for row in steps) < 10
    first, last = (fmean(row["reward"] for row in part) for part in (steps[:10], steps[-10:]))
    assert last > first - 0.02
    assert max(row["kl"] for row in steps) > 1e-5, "nothing was learned, so nothing was tested"


@pytest.mark.long
@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize("name", verify.RUNS)
def test_at_real_size(name: str, tmp_path: Path) -> None:
    """124M random weights and nano's real ones on this machine's CPU; `benchmarks/results/verify.json` has one run."""
    assert verify.main(["--only", name, "--output", str(tmp_path / "verify.json")]) == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(capfd: pytest.CaptureFixture[str]) -> None:
    small = "--model nano --max_steps 1 --num_generations 2 --per_device_train_batch_size 20 --max_completion_length 80"
    words = [*small.split(), "--use_cpu", "true", "--bf16", "false", "--reward", "continuous"]
    assert verify_determinism.main(words) == 0
    first, second = re.findall(r"^(?:first|second) run +(\w{64})$", capfd.readouterr().out, flags=re.MULTILINE)
    assert first == second
    assert first != verify_determinism.weights_of([*words, "--seed", "7"])
