"""A checkpoint that cannot be written ends the run: nothing half-written stays, and nothing older is touched."""

import tempfile
from contextlib import nullcontext
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
from tests.support.disk import files_end_at
from tests.support.toy import make_trainer


@pytest.mark.parametrize("room", [500, 20_000, 40_000])
def test_a_full_disk_ends_the_run_and_costs_no_earlier_checkpoint(tmp_path: Path, room: int) -> None:
    """Python's own files (config.json), safetensors' and torch's (optimizer.pt), each with an exception of its own."""
    trainer = make_trainer(tmp_path, max_steps=2)
    write = trainer._save_checkpoint

    def wrapped(*args: Any) -> None:
        with nullcontext() if trainer.state.global_step == 1 else files_end_at(room):
            write(*args)

    trainer._save_checkpoint = wrapped
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written.*checkpoints are untouched") as error:
        trainer.train()
    assert error.value.exit_code == UNRECOVERABLE
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert store.newest_valid(tmp_path) == tmp_path / "checkpoint-1"


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
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for error in (OSError("No space left"), SafetensorError("I/O error"), RuntimeError("failed")):

        def cut_off(staged: Path, error: Exception = error) -> None:
            (staged / "model.safetensors").write_bytes(b"ha")
            raise error

        monkeypatch.setattr(trained, "save_merged", cut_off)
        with pytest.raises(CheckpointError, match=f"checkpoint could not be written: {error}.*not be kept anywhere"):
            trained.write_model()
        assert (folder / "model.safetensors").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "temporary"]
        assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("failures", "place"),
    [(1, "run/checkpoint"), (2, "run/checkpoint.rescued"), (3, "temporary/run-checkpoint.rescued")],
)
def test_a_disk_that_is_full_at_the_end_costs_no_model(
    trained: RookWorldGRPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, place: str
) -> None:
    """One more try in place, then an error that says where the model is, whole."""
    for name in ("run", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path / "run"))
    save, calls = trained.save_merged, []

    def saved(folder: Path) -> None:
        calls.append(folder)
        with files_end_at(10_000) if len(calls) <= failures else nullcontext():
            save(folder)

    monkeypatch.setattr(trained, "save_merged", saved)
    if failures == 1:
        trained.write_model()
    else:
        with pytest.raises(CheckpointError, match=rf"run/checkpoint could not.* is whole in .*/{place}$") as error:
            trained.write_model()
        assert error.value.exit_code == UNRECOVERABLE
    assert len(calls) == failures + 1
    assert [path.relative_to(tmp_path) for path in tmp_path.glob("*/*")] == [Path(place)]
    kept, weights = load_file(tmp_path / place / "model.safetensors"), trained.model.state_dict()
    assert kept.keys() <= weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    assert (tmp_path / place / store.MANIFEST_FILE).is_file()
