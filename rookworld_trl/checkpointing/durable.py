"""A durable trainer of any kind: its checkpoints are whole or not there, and what it starts from is checked."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from rookworld_trl.checkpointing import resume, store
from rookworld_trl.checkpointing.identity import RunIdentity
from rookworld_trl.checkpointing.lock import locked, reclaim
from rookworld_trl.checkpointing.peers import watch_peers
from rookworld_trl.checkpointing.preemption import Preemption
from rookworld_trl.checkpointing.state import load_tree, save_tree
from rookworld_trl.checkpointing.store import CheckpointError

logger = logging.get_logger(__name__)

MAX_FAILED_SAVES = 3


class DurableTrainer(Trainer):
    """Stands before a trainer of transformers or TRL among a class's bases: `class Mine(DurableTrainer, SFTTrainer)`.

    Checkpoints go by `rookworld_trl.checkpointing.store` and hold, beyond what transformers keeps, the metrics not yet
    logged and the run's identity. SIGTERM and SIGINT save at the end of the step.

    Attributes:
        identity: id, start and fingerprint of the run.
        preemption: its `signal` says whether a signal ended training.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.identity = RunIdentity(run_name=self.args.run_name)
        self.preemption = Preemption()
        watch_peers(self.args.ddp_timeout)
        self._staging: Path | None = None  # stands in for the output folder while a checkpoint is written
        self._failed_saves = 0
        self._restored: dict[str, Any] = {}  # this process's progress, where the loop will not overwrite it
        self.add_callback(_StopOnSignal(self))

    def facts(self) -> dict[str, Any]:
        """What decides the result beside the arguments and the number of processes, as JSON values."""
        return {}

    # Writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-<step>`. A full disk costs this one, not the run, unless it fails again and again.

        Raises:
            CheckpointError: the last checkpoint of the run, or several in a row, could not be written.
        """
        output_dir = Path(super()._get_output_dir(trial))
        final = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = output_dir / f"{store.STAGING}{final.name}"
        folder = staging / final.name  # transformers appends this name
        try:
            with self._all_or_none(final):
                if self.args.should_save:
                    reclaim(output_dir)
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
            with self._all_or_none(final):
                self._staging = staging
                super()._save_checkpoint(model, trial)
                save_tree(folder, f"progress_{self.args.process_index}", self._progress())
            with self._all_or_none(final):
                if self.args.should_save:
                    save_tree(folder, resume.RUN_FILE, self.identity.state_dict())
                    # A pickle of arbitrary objects that nobody needs: the arguments are in run.json.
                    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                    store.commit(folder, final)
                    store.prune(output_dir, "checkpoint", self.args.save_total_limit)
        except CheckpointError as error:
            self._failed_saves += 1
            if self.control.should_training_stop or self._failed_saves >= MAX_FAILED_SAVES:
                raise
            logger.error(f"{error}. Training goes on; {MAX_FAILED_SAVES} failures in a row would end it.")
        else:
            self._failed_saves = 0
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def _all_or_none(self, final: Path) -> Iterator[None]:
        """Run the block in every process, wait for all, and fail in all if it failed in one.

        Raises:
            CheckpointError: with the cause where it happened.
        """
        cause: Exception | None = None
        try:
            yield
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            cause = error
        if self._any(cause is not None):
            raise CheckpointError(
                f"{final} could not be written: {cause or 'another process failed'}; earlier checkpoints are "
                "untouched. Make room, or make `output_dir` writable"
            ) from cause

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; waits for all of them."""
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), reduction="sum")
        return total.item() > 0

    def _get_output_dir(self, trial: Any = None) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _progress(self) -> dict[str, Any]:
        """What the loop and TRL's trainers keep between two logs."""
        return {
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
            "loss_since_log": self._tr_loss,
            "last_logged_step": self._globalstep_last_logged,
        }

    def save_final(self) -> None:
        """The model into the output folder, file by file: an old file is whole until the new one is.

        Raises:
            CheckpointError: it could not be written; the last checkpoint has the trained weights.
        """
        final = Path(self.args.output_dir)
        staging = final / f"{store.STAGING}final"
        with self._all_or_none(final):
            self.save_model(str(staging))
        with self._all_or_none(final):
            if self.args.should_save:
                (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                for file in sorted(staging.iterdir()):
                    file.replace(final / file.name)
                staging.rmdir()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None from TRL, whose example talks to a chat model."""

    # Starting

    def train(self, resume_from_checkpoint: str | Path | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train from the beginning or from a checkpoint. A run that had reached its last step takes none.

        Raises:
            ResumeError: the checkpoint does not verify, or belongs to a run with other settings.
            FolderInUseError: another run is at work in `output_dir`.
        """
        main = self.accelerator.is_main_process
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with locked(self.args.output_dir, main):
            self.identity = RunIdentity.from_state(resume.on_main_process(main, lambda: self._identify(checkpoint)))
            self.args.run_name = self.identity.run_name
            with self.preemption.watching(), self.identity.tracked():
                return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def _identify(self, checkpoint: Path | None) -> dict[str, Any]:
        """The run's identity, continued if it resumes; makes room for what it is going to write."""
        parts = {**self.args.to_dict(), "processes": self.accelerator.num_processes, **self.facts()}
        fingerprint = json.loads(json.dumps(parts, default=str))
        identity = RunIdentity(run_name=self.args.run_name, fingerprint=fingerprint)
        if checkpoint is not None:
            resume.check_whole(checkpoint)
            identity, _ = resume.admit(checkpoint, fingerprint, None)
            identity.run_name = self.args.run_name or identity.run_name
        resume.clear_the_way(Path(self.args.output_dir), checkpoint)
        return identity.state_dict()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            name = f"progress_{self.args.process_index}"
            self._restored = load_tree(Path(checkpoint), name, self.accelerator.device)
            self._metrics["train"].update(self._restored["metrics"])
            self._total_train_tokens = self._restored["tokens"]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises:
        ResumeError: the checkpoint's weights are not this model's. transformers would only warn.
        """
        state = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if state[name].data_ptr() not in loaded]  # not tied to one
        if missing or load_result.unexpected_keys:
            raise resume.ResumeError(
                f"the checkpoint's weights are another model's: missing {missing}, unexpected "
                f"{list(load_result.unexpected_keys)}; resume with the `model` that the run started from"
            )

    def _run_epoch(self, **kwargs: Any) -> None:
        """One epoch, of a finished run none, after what the loop's own preparation has overwritten is put back."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._restored:
            self._tr_loss = self._restored["loss_since_log"]
            self._globalstep_last_logged = self._restored["last_logged_step"]
            self.state.compute_steps(self.args, self.state.max_steps)  # the intervals asked for now, not then
            self._restored = {}
        super()._run_epoch(**kwargs)


class _StopOnSignal(TrainerCallback):
    """Turns a signal to any process into a checkpoint and the end of training, at the end of a step."""

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        preemption = self.trainer.preemption
        if self.trainer._any(bool(preemption.signal)):
            preemption.signal = preemption.signal or "a signal to another process"
            logger.warning(f"stopping at step {state.global_step}: {preemption.signal}")
            control.should_save = control.should_training_stop = True
        return control
