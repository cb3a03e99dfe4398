"""The long training goes on from one small file: weights, tokenizer, steps and rates come back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import nano3
from recipes.sft import SFTRecipe, new_model
from rookworld_trl.checkpointing.stopping import DONE
from rookworld_trl.checkpointing.store import newest_valid
from rookworld_trl.chess import policy
from rookworld_trl.modeling.loading import load
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer
from tests.recipes.test_sft_durable import shards  # noqa: F401, a fixture

SMALL = {"n_layer": "1", "n_embd": "16", "n_head": "2"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = build_nano_tokenizer(side_first=True)
    folder = tmp_path / "checkpoint-1400"
    torch.manual_seed(0)
    new_model(SFTRecipe(n_layer=1, n_embd=16, n_head=2, tokenizer="nano_side_first"), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_weights_come_back(checkpoint: Path, tmp_path: Path) -> None:
    """To half a thousandth; and their tokenizer, the side to move in front."""
    file = tmp_path / "nano3.safetensors"
    facts = nano3.export(checkpoint, 2_000, 25_000, file)
    assert json.loads(file.with_suffix(".json").read_text()) == facts
    assert (facts["steps"], facts["muon_lr"], facts["learning_rate"]) == (2_000, 0.008, 0.8e-3)
    assert facts["bytes"] == file.stat().st_size < 2 * facts["parameters"] + 4_000
    with safe_open(str(file), framework="pt") as content:
        assert {"steps": "2000", "muon_lr": "0.008", "learning_rate": "0.0008"}.items() <= content.metadata().items()
    assert nano3.unpack(file, tmp_path / "start") == 2_000
    (before, tokenizer), (after, again) = load(checkpoint), load(tmp_path / "start")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    weights = after.state_dict()
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=2**-11, atol=1e-7)
    ids = torch.tensor([again(policy.prompt("4k3/8/8/8/8/8/4P3/4K3 b - - 0 1"))["input_ids"]])
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("steps", "left", "rate", "fall"),
    [(0, 25_000, 0.008, 5_000), (19_000, 6_000, 0.008, 5_000), (22_500, 2_500, 0.004, 2_480)],
)
def test_a_part_does_what_is_left_at_the_rate_that_is_due(steps: int, left: int, rate: float, fall: int) -> None:
    """The fall that has begun at 20,000 goes on: half way through it, at half the rate."""
    made = nano3.plan(steps, 25_000)
    assert (made["max_steps"], made["muon_lr"], made["learning_rate"]) == (left, rate, pytest.approx(rate / 10))
    assert made["lr_scheduler_kwargs"] == {"num_decay_steps": fall}
    assert made["seed"] == 1 + steps


def test_nothing_left_and_other_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"24,990 of 25,000 steps are done: nothing is left. Give --total"):
        nano3.plan(24_990, 25_000)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="its metadata lack config, steps, tokenizer; `export` writes such a file"):
        nano3.unpack(tmp_path / "other.safetensors", tmp_path / "start")
    with pytest.raises(SystemExit, match="holds no checkpoint that is whole"):
        nano3.main(["export", "--output", str(tmp_path)])


def test_a_part_begins_with_the_file_and_is_exported_again(
    checkpoint: Path,
    shards: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`train` as written, of another size: two steps of the recipe from the file, then the file says two more."""
    monkeypatch.setattr(nano3, "FILE", tmp_path / "nano3.safetensors")
    nano3.export(checkpoint, 2_000, 25_000, nano3.FILE)
    reached: list[Any] = []

    def run(words: list[str], cwd: Path) -> Any:
        from recipes import sft

        settings = {**SMALL, "max_steps": "2", "save_steps": "1", "per_device_train_batch_size": "2", "bf16": "false"}
        small = [word for key, value in settings.items() for word in (f"--{key}", value)]
        reached.append(words)
        return type("Done", (), {"returncode": sft.program([*words[2:], *small])})

    monkeypatch.setattr(nano3.subprocess, "run", run)
    part = tmp_path / "part"
    with pytest.raises(SystemExit) as ended:
        nano3.main(["train", "--positions", str(shards), "--output", str(part), "--dataloader_num_workers", "0"])
    assert ended.value.code == DONE
    assert "--max_steps 23000" in " ".join(reached[0])
    newest = newest_valid(part / "run")
    assert newest is not None
    trained, start = load(newest)[0].state_dict(), load(part / "start")[0].state_dict()
    moved = max((trained[name] - weight).abs().max().item() for name, weight in start.items())
    assert 0 < moved < 0.02, "two steps of a rising rate from the exported weights"
    nano3.main(["export", "--output", str(part)])
    assert json.loads((tmp_path / "nano3.json").read_text())["steps"] == 2_002
    assert nano3.words_of(shards, part, 25_000) == reached[0][1:-2], "the same command resumes"
