"""What a run has learned outlives a full disk: the model, whole, in another place or once there is room again."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

RETRIES, RETRY_SECONDS = 40, 15.0  # ten minutes to make room in, where no disk has any
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

    A model alone is a third of a checkpoint, and another disk may have room: tried are the output folder, the user's,
    the present and the temporary folder, shared memory, and then the output folder for ten minutes again.

    Raises:
        CheckpointError: the block's, with the place where the model is.
    """
    try:
        yield
    except CheckpointError as error:
        place = _rescue(save, output_dir, main)
        kept = f"The model as trained so far is whole in {place}" if place else "Its model could not be saved either"
        raise CheckpointError(f"{error}. {kept}") from error


def _rescue(save: Save, output_dir: Path, main: bool) -> Path | None:
    if _written(save, output_dir, main):
        return output_dir / MODEL_FOLDER
    others = [os.path.expanduser("~"), ".", os.environ.get("TMPDIR", "/tmp"), "/dev/shm"]  # the last one is memory
    for place in ranks.decided(main, lambda: others):
        folder = ranks.decided(main, partial(_folder_in, place, output_dir.name))
        if folder is not None and _written(save, folder, main):
            return folder / MODEL_FOLDER
        if folder is not None and main:
            shutil.rmtree(folder, ignore_errors=True)
    logger.error(f"no disk has room for the model: make some in {output_dir}. Trying for ten minutes")
    for _ in range(RETRIES):
        time.sleep(RETRY_SECONDS)
        if _written(save, output_dir, main):
            return output_dir / MODEL_FOLDER
    return None


def _written(save: Save, folder: Path, main: bool) -> bool:
    try:
        write_model(save, folder, main)
    except CheckpointError:
        return False
    return True


def _folder_in(place: str, name: str) -> Path | None:
    """A new folder there; None where that cannot be."""
    try:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place)).resolve()
    except OSError:
        return None
