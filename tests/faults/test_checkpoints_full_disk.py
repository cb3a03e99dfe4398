"""A checkpoint that cannot be written costs itself: nothing half-written stays, and nothing older is touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.store import CheckpointError
from tests.support.disk import files_end_at
from tests.support.toy import make_trainer


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
