"""What lies on the disk: damage of every file found, the newest whole checkpoint chosen, retention."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rookworld_trl.checkpointing import store

SHA256_OF_OPTIMIZER = "94d1a3287212297dad9539489e07c029ae6336c91ae27b2b2b7028a1ccc9c501"
FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "tokenizer/vocab.json")


def write(output_dir: Path, name: str, weight: float = 1.0) -> Path:
    """A small checkpoint of the usual files, committed."""
    staged = output_dir / f".staging-{name}"
    (staged / "tokenizer").mkdir(parents=True)
    for file in FILES:
        (staged / file).write_text(f"{file} of {name}, long enough to be cut short\n")
    save_file({"w": torch.full((4,), weight)}, staged / "model.safetensors")
    store.commit(staged, output_dir / name)
    return output_dir / name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("file", [*FILES, store.MANIFEST_FILE])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found_and_named(tmp_path: Path, file: str, damage: str) -> None:
    good, bad = write(tmp_path, "checkpoint-1"), write(tmp_path, "checkpoint-2")
    assert store.verify(bad) == []
    assert store.newest_valid(tmp_path) == bad
    DAMAGE[damage](bad / file)
    if file == store.MANIFEST_FILE and damage == "flipped":  # one bit of JSON: a name, a size, a hash or the syntax
        assert store.verify(bad)
    else:
        assert any(file in problem for problem in store.verify(bad))
    assert store.newest_valid(tmp_path) == good


def test_manifest_against_an_independent_hash(tmp_path: Path) -> None:
    folder = write(tmp_path, "checkpoint-1")
    entry = json.loads((folder / "manifest.json").read_text())["files"]["optimizer.pt"]
    # sha256sum of "optimizer.pt of checkpoint-1, long enough to be cut short\n"
    assert entry == {"bytes": 58, "sha256": SHA256_OF_OPTIMIZER}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(FILES)


def test_weights_that_are_not_finite_do_not_verify(tmp_path: Path) -> None:
    good, bad = write(tmp_path, "checkpoint-1"), write(tmp_path, "checkpoint-2", weight=float("inf"))
    assert store.verify(bad) == ["model.safetensors holds NaN or Inf in w"]
    assert store.newest_valid(tmp_path) == good


def test_pickled_weights_slipped_in_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "checkpoint-1")
    (folder / "notes.txt").write_text("a person's notes are harmless")
    assert store.verify(folder) == []
    (folder / "pytorch_model.bin").write_bytes(b"payload")
    assert store.verify(folder) == ["pytorch_model.bin is not in manifest.json"]
    store.commit(folder.rename(tmp_path / "staged"), folder)
    assert store.verify(folder) == ["pytorch_model.bin is a pickle of weights"]


def test_a_checkpoint_without_optimizer_is_not_one(tmp_path: Path) -> None:
    staged = tmp_path / ".staging-checkpoint-1"
    staged.mkdir()
    save_file({"w": torch.ones(1)}, staged / "model.safetensors")
    store.commit(staged, tmp_path / "checkpoint-1")
    assert store.verify(tmp_path / "checkpoint-1") == [
        "there is no trainer state (trainer_state.json)",
        "there is no schedule (scheduler.pt)",
        "there is no optimizer state (optimizer.pt or optimizer_ or optimizer.bin or global_step)",
    ]


def test_newest_by_step_not_by_time_or_text(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "superseded-checkpoint-99"):
        write(tmp_path, name)
    (tmp_path / "checkpoint-final").mkdir()
    os.utime(tmp_path / "checkpoint-9", (4e9, 4e9))  # a clock that jumped
    names = [folder.name for folder in store.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-9"]
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    assert store.newest_valid(tmp_path) == tmp_path / "checkpoint-9"
    assert store.newest_valid(tmp_path / "nowhere") is None


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, f"checkpoint-{step}")
    store.prune(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    store.prune(tmp_path, None, best=None)
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4", "checkpoint-5"}
