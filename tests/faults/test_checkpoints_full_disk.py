"""A checkpoint that cannot be written costs itself: nothing half-written stays, nothing older is touched, and where it
was the last one, the model alone is there, whole, or the message says that it is not."""

import json
from collections.abc import Callable
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


def failing_at(trainer: Any, steps: set[int], size: int) -> Callable[..., Path]:
    """Saves of these steps meet a full disk."""
    write = trainer.write_checkpoint

    def wrapped(*args: Any, **kwargs: Any) -> Path:
        if trainer.state.global_step not in steps:
            return write(*args, **kwargs)
        with files_end_at(size):
            return write(*args, **kwargs)

    return wrapped


# Python's own files, safetensors' and torch's, each with an exception of its own.
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(500, id="config.json", marks=pytest.mark.slow),
        pytest.param(20_000, id="model.safetensors"),
        pytest.param(40_000, id="optimizer.pt", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.write_checkpoint = failing_at(trainer, {2}, size)  # type: ignore[method-assign]
    trainer.train()
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["checkpoint-1", "checkpoint-3"]
    assert all(store.verify(tmp_path / name) == [] for name in names)
    assert "checkpoint-2 could not be written" in caplog.text
    assert "Make room" in caplog.text


def test_the_last_checkpoint_has_to_be_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.write_checkpoint = failing_at(trainer, {2}, 500)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written.*earlier checkpoints are untouched"):
        trainer.train()
    assert store.newest_valid(tmp_path) == tmp_path / "checkpoint-1"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=9)
    trainer.write_checkpoint = failing_at(trainer, set(range(2, 9)), 500)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError):
        trainer.train()
    assert trainer.state.global_step == 4  # 2, 3 and 4 failed
    assert store.newest_valid(tmp_path) == tmp_path / "checkpoint-1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RookWorldGRPOTrainer:
    trainer = make_trainer(tmp_path_factory.mktemp("trained"), max_steps=1, save_strategy="no")
    trainer.train()
    return trainer


@pytest.mark.parametrize("error", [OSError("No space left"), SafetensorError("I/O error"), RuntimeError("failed")])
def test_the_model_is_written_whole_or_not_at_all(
    trained: RookWorldGRPOTrainer, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    trained.write_model()
    folder = tmp_path / "checkpoint"
    names = ["config.json", "generation_config.json", "manifest.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "tokenizer.json", "tokenizer_config.json"]
    before = (folder / "model.safetensors").read_bytes()

    def cut_off(staged: Path) -> None:
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


@pytest.mark.parametrize(
    ("raised", "match", "calls"),
    [
        (CheckpointError("disk full"), "disk full. Its model could not be saved either", 1),
        (ZeroDivisionError("other errors pass"), "other errors pass", 0),
    ],
)
def test_it_tries_once_and_after_a_checkpoint_alone(
    trained: RookWorldGRPOTrainer,
    raised: Exception,
    match: str,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    monkeypatch.setattr(trained, "save_merged", lambda folder: (tried.append(folder), full_disk()))
    with pytest.raises(type(raised), match=match), trained.at_work():
        raise raised
    assert len(tried) == calls
    assert list(tmp_path.iterdir()) == []
