"""A last checkpoint that finds no room: the model alone is there, whole, or the message says that it is not."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.exits import UNRECOVERABLE
from rookworld_trl.checkpointing.rescue import rescued, write_model
from rookworld_trl.checkpointing.store import CheckpointError
from tests.support.disk import files_end_at
from tests.support.toy import make_trainer, policy


class Saves:
    """Saves a model where there is room; else a part of it, as a full disk does."""

    def __init__(self, room: bool, error: Exception | None = None):
        self.room, self.calls = room, 0
        self.error = error or OSError(errno.ENOSPC, "No space left on device")

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "training_args.bin").write_bytes(b"a pickle")
        (folder / "config.json").write_text("{}")
        if not self.room:
            (folder / "model.safetensors").write_bytes(b"ha")
            raise self.error
        (folder / "model.safetensors").write_bytes(b"whole")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error"), RuntimeError("writing failed")]
)
def test_the_model_is_written_whole_or_not_at_all(tmp_path: Path, error: Exception) -> None:
    write_model(Saves(room=True), tmp_path, main=True)
    folder = tmp_path / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=f"checkpoint could not be written: .*{error.args[-1]}"):
        write_model(Saves(room=False, error=error), tmp_path, main=True)
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_without_room_leaves_some_for_its_model(tmp_path: Path) -> None:
    """A real write that the kernel cuts short, and one that it does not."""
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    with pytest.raises(CheckpointError, match=r"large.* The model .* whole in .*/checkpoint") as error:  # noqa: SIM117
        with rescued(trainer.save_merged, tmp_path, main=True), files_end_at(10_000):
            write_model(trainer.save_merged, tmp_path, main=True)
    assert error.value.exit_code == UNRECOVERABLE
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")["transformer.wte.weight"]
    assert not torch.equal(saved, policy().state_dict()["transformer.wte.weight"])
    assert torch.equal(saved, trainer.model.state_dict()["transformer.wte.weight"])
    manifest = json.loads((tmp_path / "checkpoint" / store.MANIFEST_FILE).read_text())
    assert store.damage(tmp_path / "checkpoint", manifest["files"]) == []


@pytest.mark.parametrize(
    ("raised", "match", "calls"),
    [
        (CheckpointError("disk full"), "disk full. Its model could not be saved either", 1),
        (ZeroDivisionError("other errors pass"), "other errors pass", 0),
    ],
)
def test_it_tries_once_and_after_a_checkpoint_alone(tmp_path: Path, raised: Exception, match: str, calls: int) -> None:
    save = Saves(room=False)
    with pytest.raises(type(raised), match=match), rescued(save, tmp_path, main=True):
        raise raised
    assert save.calls == calls
    assert list(tmp_path.iterdir()) == []
