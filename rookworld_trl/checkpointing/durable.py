"""A durable trainer of any kind: its checkpoints are whole or not there, and what it starts from is checked."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import distributed
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing import resume, store
from rookworld_trl.checkpointing.resume import ResumeError, RunIdentity
from rookworld_trl.checkpointing.stopping import Preemption, locked
from rookworld_trl.checkpointing.store import CheckpointError, load_tree, save_tree

logger = logging.get_logger(__name__)


class DurableTrainer(Trainer):
    """Stands before a trainer of transformers or TRL among a class's bases: `class Mine(DurableTrainer, SFTTrainer)`.

    Checkpoints go by `rookworld_trl.checkpointing.store` and hold, beyond what transformers keeps (weights, optimizer,
    schedule, generators of each process), the metrics not yet logged and the run's identity. A signal saves at the end
    of the step.

    Attributes:
        identity: id, start and fingerprint of the run.
        preemption: its `signal` says which signal ended training, if one did.
    """

    args: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.identity = RunIdentity(run_name=self.args.run_name)
        self.preemption = Preemption()
        if distributed.is_initialized():  # on the CPU transformers forgets to, and torch's half hour would hold
            _set_pg_timeout(timedelta(seconds=self.args.ddp_timeout))
        self._staging: Path | None = None  # stands in for the output folder while a checkpoint is written
        self._restored: dict[str, Any] = {}  # this process's progress, where the loop will not overwrite it
        self._learning_rate_factor = 1.0  # applied once, when optimizer and schedule have been restored
        self._recipe: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._fingerprint: dict[str, Any] = {}
        self.add_callback(_StepEnd(self))

    # What a trainer of one kind adds

    def facts(self) -> dict[str, Any]:
        """What decides the result beside settings and the number of processes; asked before training."""
        return {}

    def progress(self) -> dict[str, Any]:
        """What the loop and TRL's trainers keep in this process between two logs."""
        return {
            "metrics": dict(self._metrics["train"]),
            "loss_since_log": getattr(self, "_tr_loss", None),  # neither exists before training starts
            "last_logged_step": getattr(self, "_globalstep_last_logged", 0),
        }

    def _write_parts(self, folder: Path) -> None:
        """Files of the main process beside those of transformers."""
        save_tree(folder, resume.RUN_FILE, vars(self.identity))

    # Writing

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with as_it_generates(self.model):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the present state as `checkpoint-<step>`, after which older ones go, but for the best.

        Raises:
            CheckpointError: it could not be written.
        """
        final = Path(super()._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._staged(final, final.name) as folder:  # transformers appends the name
            self._staging = folder.parent
            try:
                super()._save_checkpoint(self.model, trial)
            finally:
                self._staging = None
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == folder:
                self.state.best_model_checkpoint = str(final)
            save_tree(folder, f"progress_{self.args.process_index}", self.progress())
            if self.args.should_save:
                self._write_parts(folder)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.should_save:
            store.prune(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _staged(self, final: Path, inner: str = "") -> Iterator[Path]:
        """A folder for all processes to fill, which becomes `final` once all of them have come through the block.

        Args:
            inner: the folder's place below the one that is made.

        Raises:
            CheckpointError: some process could not write; what was there before is as it was.
        """
        staging, writes = final.with_name(store.STAGING + final.name), self.args.should_save
        try:
            with self._all_or_none(final):
                if writes:
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
            with self._all_or_none(final):
                yield staging / inner
            with self._all_or_none(final):
                if writes:
                    # A pickle of arbitrary objects that nobody needs: the arguments are in run.json.
                    (staging / inner / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                    store.commit(staging / inner, final)
        finally:
            if writes:
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
        if ranks.anywhere(cause is not None, self.accelerator):
            raise CheckpointError(
                f"{final} could not be written: {cause or 'another process failed'}; earlier checkpoints are "
                "untouched. Make room, or make `output_dir` writable"
            ) from cause

    def _get_output_dir(self, trial: Any = None) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def save_final(self) -> None:
        """The model into the output folder.

        Raises:
            CheckpointError: it could not be written; the last checkpoint has the trained weights.
        """
        with self._all_or_none(Path(self.args.output_dir)):
            self.save_model()
            Path(self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None from TRL, whose example talks to a chat model: the run writes its own, with what it measured."""

    # Starting

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train from the beginning, from a checkpoint, or (True) from the newest in `output_dir` that verifies.

        A run that had reached its last step takes none. Checkpoints of `output_dir` that the start leaves behind are
        renamed to `superseded-...`.

        Raises:
            FolderInUseError: another run is at work in `output_dir`.
            ResumeError: the checkpoint does not verify, or belongs to a run with other settings.
        """
        main = self.accelerator.is_main_process
        with locked(self.args.output_dir, main):
            start = ranks.decided(main, lambda: self._choose_start(resume_from_checkpoint))
            checkpoint, self.identity, self._learning_rate_factor = start
            self.args.run_name = self.identity.run_name
            with self.preemption.watching(), self.identity.tracked(), self._telling_the_end():
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Something has happened to the run: in the main process, every callback with a method `told` is."""
        for callback in self.callback_handler.callbacks if self.args.should_save else ():
            if hasattr(callback, "told"):
                callback.told({"run": self.args.output_dir, **event})

    @contextmanager
    def _telling_the_end(self) -> Iterator[None]:
        """However the block ends: `outcome` says how."""
        outcome = "finished"
        try:
            yield
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            reason = self.stop_reason or self.preemption.signal
            self.tell({"event": "end", "outcome": outcome, "step": self.state.global_step, "stop_reason": reason})

    @property
    def stop_reason(self) -> str:
        """Why a check of the run's own stopped it before its last step, as its log says; empty if none did."""
        now = [row for row in self.state.log_history if row["step"] == self.state.global_step]
        return next((row["stop_reason"] for row in now if "stop_reason" in row), "")

    def admit(self, checkpoint: Path | None, recipe: Mapping[str, Any]) -> None:
        """Hold the run against the one that wrote the checkpoint, before anything is measured, written or trained.

        Args:
            recipe: settings that are not the trainer's but belong to the run; kept in its checkpoints.

        Raises:
            ResumeError: they are two runs; the message names each fact that differs.
        """
        self._recipe = dict(recipe)
        ranks.decided(self.accelerator.is_main_process, lambda: self._identity(checkpoint))

    def _identity(self, checkpoint: Path | None) -> tuple[RunIdentity, dict[str, Any]]:
        """Who the run is, and which settings are others than in the checkpoint; in the main process alone."""
        if not self._fingerprint:  # made once, of what there is before training
            self._facts = json.loads(json.dumps(self.facts(), default=str))  # as from a file, without tuples
            self._facts["processes"] = self.accelerator.num_processes
            self._fingerprint = {**resume.settings(self.args, self._recipe), **self._facts}
        if checkpoint is None:
            return RunIdentity(run_name=self.args.run_name, fingerprint=self._fingerprint), {}
        decide = self._facts.keys() - {"model_commit"}  # a note: the digest of the weights says what they are
        identity, changes = resume.compared(checkpoint, self._fingerprint, decide)
        identity.fingerprint, identity.run_name = self._fingerprint, self.args.run_name or identity.run_name
        return identity, changes

    def _choose_start(self, wanted: str | Path | bool | None) -> tuple[Path | None, RunIdentity, float]:
        """Checkpoint, identity and learning rate factor of the start; in the main process alone."""
        output_dir = Path(self.args.output_dir)
        checkpoint = store.newest_valid(output_dir) if wanted is True else Path(wanted) if wanted else None
        if wanted is True and checkpoint is None:
            raise ResumeError(f"{output_dir} holds no checkpoint that verifies; train without one")
        if checkpoint is not None:
            resume.check_whole(checkpoint)
        identity, changes = self._identity(checkpoint)
        if changes:
            logger.warning(f"resuming from {checkpoint} with other settings from here on: {resume.spelled(changes)}")
        then, now = changes.get("learning_rate", (1.0, 1.0))
        factor = now / then if then else 1.0
        if checkpoint is not None and self.args.recovery_mode:
            factor *= resume.RECOVERY_LEARNING_RATE
        resume.clear_the_way(output_dir, checkpoint)
        return checkpoint, identity, factor

    def preempted(self) -> bool:
        """Whether a signal has come to any process. Every process must call this, between phases."""
        return ranks.anywhere(bool(self.preemption.signal), self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Everything that a checkpoint holds but weights and generators, which transformers restores by itself."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        name = f"progress_{self.args.process_index}"
        self._restored = load_tree(Path(checkpoint), name, self.accelerator.device)
        self._metrics["train"].clear()
        self._metrics["train"].update(self._restored["metrics"])
        resume.scale_learning_rate(self.optimizer, self.lr_scheduler, self._learning_rate_factor)
        then = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if then.max_steps != self.state.max_steps:
            resume.lay_schedule_anew(self.optimizer, self.lr_scheduler)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises:
        ResumeError: the checkpoint's weights are not this model's. transformers would only warn.
        """
        state = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if state[name].data_ptr() not in loaded]  # not tied to one
        if missing or load_result.unexpected_keys:
            raise ResumeError(
                f"the checkpoint's weights are another model's: missing {missing}, unexpected "
                f"{list(load_result.unexpected_keys)}; resume with the `model` that the run started from"
            )

    def _run_epoch(self, **kwargs: Any) -> None:
        """One epoch, of a finished run none, after what the loop's own preparation has overwritten is put back."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._restored:
            if self._restored["loss_since_log"] is not None:
                self._tr_loss = self._restored["loss_since_log"]
                self._globalstep_last_logged = self._restored["last_logged_step"]
            self.state.compute_steps(self.args, self.state.max_steps)  # the intervals asked for now, not then
            self._restored = {}
        super()._run_epoch(**kwargs)


@contextmanager
def as_it_generates(model: Any) -> Iterator[None]:
    """Run the block, which saves the model, with its cache on.

    transformers' trainers turn it off in its configuration, and of a model that is saved so `generate` begins at the
    first token for each.
    """
    config: Any = getattr(model, "config", None)
    trained = getattr(config, "use_cache", None)
    try:
        if trained is not None:
            config.use_cache = True
        yield
    finally:
        if trained is not None:
            config.use_cache = trained


class _StepEnd(TrainerCallback):
    """Ends a step, and turns a signal to any process into a checkpoint and the end of training."""

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        trainer = self.trainer
        if trainer.preempted():
            trainer.preemption.signal = trainer.preemption.signal or "a signal to another process"
            logger.warning(f"stopping at step {state.global_step}: {trainer.preemption.signal}")
            control.should_save = control.should_training_stop = True
        return control
