"""What a run has learned outlives a checkpoint for which there is no room: the model alone is a third of one."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.lock import reclaim
from rookworld_trl.checkpointing.store import MODEL_FOLDER, CheckpointError

logger = logging.get_logger(__name__)

_FAILURES = (OSError, RuntimeError, ValueError, SafetensorError)  # of Python, torch, transformers and safetensors

Save = Callable[[Path], Any]


def write_model(save: Save, output_dir: Path, main: bool) -> None:
    """Have `checkpoint/` written, whole or not at all, with a manifest; every process must call this.

    Args:
        save: writes model and tokenizer into a folder; of its files, the pickled arguments are left out.
        main: whether this process is the one that writes.

    Raises:
        CheckpointError: disk full, no permission; what was there before is as it was.
    """
    final = output_dir / MODEL_FOLDER
    staged = output_dir / f"{store.STAGING}{MODEL_FOLDER}"
    failure: Exception | None = None

    def prepare() -> None:
        reclaim(output_dir)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)

    def publish() -> None:
        if failure is not None:
            raise OSError(str(failure)) from failure
        (staged / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        store.commit(staged, final)

    try:
        ranks.decided(main, prepare)
        try:
            save(staged)
        except _FAILURES as error:
            failure = error
        ranks.decided(main, publish)
    except _FAILURES as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    finally:
        if main:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def rescued(save: Save, output_dir: Path, main: bool) -> Iterator[None]:
    """Where a checkpoint that cannot be written ends the block, keep its model; every process must use this.

    A checkpoint that was cut off leaves room behind, often enough for a model alone.

    Raises:
        CheckpointError: the block's, with the place where the model is.
    """
    try:
        yield
    except CheckpointError as error:
        try:
            write_model(save, output_dir, main)
        except CheckpointError:
            raise CheckpointError(f"{error}. Its model could not be saved either") from error
        kept = output_dir / MODEL_FOLDER
        raise CheckpointError(f"{error}. The model as trained so far is whole in {kept}") from error
