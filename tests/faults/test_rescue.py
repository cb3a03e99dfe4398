"""A disk that stays full at the end of a run: its model is somewhere, whole, and the message says where."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rookworld_trl.checkpointing import rescue, store
from rookworld_trl.checkpointing.exits import UNRECOVERABLE
from rookworld_trl.checkpointing.rescue import rescued, write_model
from rookworld_trl.checkpointing.store import CheckpointError
from tests.support.disk import files_end_at
from tests.support.toy import make_trainer, policy


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """A run's folder and the other places where there could be room, none of which has any."""
    made = {name: tmp_path / name for name in ("run", "home", "here", "temporary")}
    for path in made.values():
        path.mkdir()
    monkeypatch.setenv("HOME", str(made["home"]))
    monkeypatch.setenv("TMPDIR", str(made["temporary"]))
    monkeypatch.chdir(made["here"])
    yield made
    for path in Path("/dev/shm").glob("run-*"):
        shutil.rmtree(path)


class Saves:
    """Saves a model below the places that have room; elsewhere a part of it, as a full disk does."""

    def __init__(self, *room: Path, error: Exception | None = None):
        self.room, self.calls = room, 0
        self.error = error or OSError(errno.ENOSPC, "No space left on device")

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "training_args.bin").write_bytes(b"a pickle")
        (folder / "config.json").write_text("{}")
        if not any(folder.is_relative_to(place) for place in self.room):
            (folder / "model.safetensors").write_bytes(b"ha")
            raise self.error
        (folder / "model.safetensors").write_bytes(b"whole")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error"), RuntimeError("writing failed")]
)
def test_the_model_is_written_whole_or_not_at_all(tmp_path: Path, error: Exception) -> None:
    write_model(Saves(tmp_path), tmp_path, main=True)
    folder = tmp_path / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=f"checkpoint could not be written: .*{error.args[-1]}"):
        write_model(Saves(error=error), tmp_path, main=True)
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_place_with_room_gets_the_model(places: dict[str, Path]) -> None:
    """The last one asked but memory: of the others nothing is left behind."""
    save = Saves(places["temporary"])
    with pytest.raises(CheckpointError) as error, rescued(save, places["run"], main=True):
        write_model(save, places["run"], main=True)
    assert error.value.exit_code == UNRECOVERABLE
    (kept,) = places["temporary"].iterdir()
    assert (kept / "checkpoint" / "model.safetensors").read_bytes() == b"whole"
    assert f"The model as trained so far is whole in {kept}/checkpoint" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert not [*places["run"].iterdir(), *places["home"].iterdir(), *places["here"].iterdir()]


def test_a_checkpoint_that_finds_no_room_may_leave_enough_for_its_model(places: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"too big. The model .* whole in .*run/checkpoint"):  # noqa: SIM117
        with rescued(Saves(places["run"]), places["run"], main=True):
            raise CheckpointError("too big")


def test_other_errors_pass(places: dict[str, Path]) -> None:
    save = Saves(places["run"])
    with pytest.raises(ZeroDivisionError), rescued(save, places["run"], main=True):
        raise ZeroDivisionError
    assert save.calls == 0


def test_where_no_disk_has_room_it_waits_for_some(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Real writes that the kernel cuts short, wherever they go, until somebody makes room."""
    trainer = make_trainer(places["run"], max_steps=1, save_strategy="no")
    with ExitStack() as full:

        def third_time(seconds: float) -> None:
            sleeps.append(seconds)
            if len(sleeps) == 3:
                full.close()

        sleeps: list[float] = []
        monkeypatch.setattr(rescue.time, "sleep", third_time)
        trainer.train()
        full.enter_context(files_end_at(10_000))
        with pytest.raises(CheckpointError, match=r"The model .* whole in .*run/checkpoint"):  # noqa: SIM117
            with rescued(trainer.save_merged, places["run"], main=True):
                write_model(trainer.save_merged, places["run"], main=True)
    assert len(sleeps) == 3
    assert "make some in" in caplog.text
    saved = load_file(places["run"] / "checkpoint" / "model.safetensors")
    assert not torch.equal(saved["transformer.wte.weight"], policy().state_dict()["transformer.wte.weight"])
    assert torch.equal(saved["transformer.wte.weight"], trainer.model.state_dict()["transformer.wte.weight"])
    manifest = json.loads((places["run"] / "checkpoint" / store.MANIFEST_FILE).read_text())
    assert store.damage(places["run"] / "checkpoint", manifest["files"]) == []


def test_it_does_not_wait_for_ever(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []
    monkeypatch.setattr(rescue.time, "sleep", sleeps.append)
    with pytest.raises(CheckpointError, match="Its model could not be saved either"):  # noqa: SIM117
        with rescued(Saves(), places["run"], main=True):
            raise CheckpointError("disk full")
    assert sum(sleeps) == 600
    assert not [path for place in places.values() for path in place.iterdir()]
