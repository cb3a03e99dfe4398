"""A checkpoint that cannot be written costs itself: nothing half-written stays, nothing older is touched, and where it
was the last one, the model alone is there, whole, or the message says that it is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.stopping import UNRECOVERABLE
from rookworld_trl.checkpointing.store import CheckpointError
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.support.disk import files_end_at, full_disk
from tests.support.toy import make_trainer, policy


def fail(trainer: Any, sizes: dict[int, int]) -> None:
    """Saves of these steps meet a disk on which files end at so many bytes."""
    write = trainer.write_checkpoint

    def wrapped(*args: Any, **kwargs: Any) -> Path:
        if trainer.state.global_step not in sizes:
            return write(*args, **kwargs)
        with files_end_at(sizes[trainer.state.global_step]):
            return write(*args, **kwargs)

    trainer.write_checkpoint = wrapped


def test_a_full_disk_costs_one_checkpoint_and_ends_the_run_if_it_stays_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Python's own files (config.json), safetensors' and torch's (optimizer.pt), each with an exception of its own."""
    trainer = make_trainer(tmp_path, max_steps=12, save_total_limit=None, stable_after_steps=0)
    fail(trainer, {2: 500, 4: 20_000, 6: 40_000} | dict.fromkeys(range(8, 12), 500))
    with pytest.raises(CheckpointError, match="checkpoint-10 could not be written"):
        trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (1, 3, 5, 7)}
    assert all(store.verify(folder) == [] for folder in tmp_path.iterdir())
    for step in (2, 4, 6, 8, 9):
        assert f"checkpoint-{step} could not be written" in caplog.text
    assert "Make room" in caplog.text


def test_the_last_checkpoint_has_to_be_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    fail(trainer, {2: 500})
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written.*earlier checkpoints are untouched"):
        trainer.train()
    assert store.newest_valid(tmp_path) == tmp_path / "checkpoint-1"
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RookWorldGRPOTrainer:
    trainer = make_trainer(tmp_path_factory.mktemp("trained"), max_steps=1, save_strategy="no")
    trainer.train()
    return trainer


def test_the_model_is_written_whole_or_not_at_all(
    trained: RookWorldGRPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    trained.write_model()
    folder = tmp_path / "checkpoint"
    names = ["config.json", "generation_config.json", "manifest.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "tokenizer.json", "tokenizer_config.json"]
    before = (folder / "model.safetensors").read_bytes()
    for error in (OSError("No space left"), SafetensorError("I/O error"), RuntimeError("failed")):

        def cut_off(staged: Path, error: Exception = error) -> None:
            (staged / "model.safetensors").write_bytes(b"ha")
            raise error

        monkeypatch.setattr(trained, "save_merged", cut_off)
        with pytest.raises(CheckpointError, match=f"checkpoint could not be written: {error}"):
            trained.write_model()
        assert (folder / "model.safetensors").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_without_room_leaves_some_for_its_model(
    trained: RookWorldGRPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real write that the kernel cuts short, and one that it does not."""
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"large.* The model .* whole in .*/checkpoint") as error:  # noqa: SIM117
        with trained.at_work(), files_end_at(10_000):
            trained.write_model()
    assert error.value.exit_code == UNRECOVERABLE
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")["transformer.wte.weight"]
    assert not torch.equal(saved, policy().state_dict()["transformer.wte.weight"])
    assert torch.equal(saved, trained.model.state_dict()["transformer.wte.weight"])
    manifest = json.loads((tmp_path / "checkpoint" / store.MANIFEST_FILE).read_text())
    assert store.damage(tmp_path / "checkpoint", manifest["files"]) == []


def test_it_tries_once_and_after_a_checkpoint_alone(
    trained: RookWorldGRPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    monkeypatch.setattr(trained, "save_merged", lambda folder: (tried.append(folder), full_disk()))
    with pytest.raises(ZeroDivisionError), trained.at_work():
        raise ZeroDivisionError
    assert tried == []
    with pytest.raises(CheckpointError, match=r"disk full\. Its model could not be saved either"), trained.at_work():
        raise CheckpointError("disk full")
    assert len(tried) == 1
    assert list(tmp_path.iterdir()) == []
