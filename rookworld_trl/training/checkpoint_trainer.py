"""The trainer's checkpoints: whole or not there, and resumed exactly, at any step, by the run that wrote them."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress
from trl.trainer.utils import RepeatSampler

from rookworld_trl.checkpointing import identity, resume, store
from rookworld_trl.checkpointing.lock import locked, reclaim
from rookworld_trl.checkpointing.peers import watch_peers
from rookworld_trl.checkpointing.preemption import Preemption
from rookworld_trl.checkpointing.state import Stateful, load_state, load_tree, save_state, save_tree
from rookworld_trl.checkpointing.store import CheckpointError, Kind
from rookworld_trl.modeling.hub import push_in_background
from rookworld_trl.training.recovery import LearningRateCut
from rookworld_trl.training.recovery_trainer import RecoveryTrainer

logger = logging.get_logger(__name__)

EXTRA_FILE = "extra"  # .json, .safetensors: what `save_special` was given
MAX_FAILED_SAVES = 3


class EpochSampler(RepeatSampler):
    """TRL's sampler, with the shuffle of each epoch drawn from seed and epoch alone.

    TRL's draws on and on from one generator, so a resumed run would see the first epoch's order again. In epoch 0 both
    give the same order.
    """

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        return super().__iter__()


class CheckpointTrainer(RecoveryTrainer):
    """Writes checkpoints by `rookworld_trl.checkpointing.store` and resumes from them bit for bit on the same CPU.

    Beyond what transformers keeps (weights, optimizer, schedule, generators of each process), a checkpoint holds the
    place in TRL's generation cycle with its completions, metrics not yet logged, every control, and the run's identity.

    Attributes:
        identity: id, start and fingerprint of the run.
        preemption: its `signal` says which signal ended training, if one did.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.identity = identity.RunIdentity(run_name=self.args.run_name)
        self.preemption = Preemption()
        watch_peers(self.args.ddp_timeout)
        self._staging: Path | None = None  # stands in for the output folder while a checkpoint is written
        self._failed_saves = 0
        self._unproven: list[Path] = []  # regular checkpoints that healthy steps may yet make stable
        self._restored: dict[str, Any] = {}  # this process's progress, where the loop will not overwrite it
        self._learning_rate_factor = 1.0  # applied once, when optimizer and schedule have been restored
        self._epoch_sampler: EpochSampler | None = None
        self._recipe: dict[str, Any] = {}
        self._fingerprint: dict[str, Any] | None = None
        self.add_callback(_StepEnd(self))

    # Writing

    def _controls(self) -> dict[str, Stateful]:
        """What carries state from step to step; layers above add theirs."""
        return {
            **super()._controls(),
            "kl_controller": self.kl_controller,
            "reference_reset": self.reference_reset,
        }

    def save_special(
        self, kind: Literal["stable", "recovery", "debug"], extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the present state as `<kind>-<step>`, outside of the rotation; every process must call this.

        Args:
            extra: nested dicts and lists of values and tensors, kept beside the state in extra.json and
                extra.safetensors; of all processes, the first one's.

        Raises:
            CheckpointError: it could not be written.
        """
        folder = self._write(kind, None, extra)
        if self.args.should_save:
            limit = self.args.stable_total_limit if kind == "stable" else self.args.debug_total_limit
            store.prune(folder.parent, kind, max(1, limit), [folder])  # later steps' may be there
        return folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A regular checkpoint. A full disk costs this one, not the run, unless it fails again and again or at the end.

        Raises:
            CheckpointError: the last checkpoint of the run, or several in a row, could not be written.
        """
        try:
            folder = self._write("checkpoint", trial)
        except CheckpointError as error:
            self._failed_saves += 1
            if self.control.should_training_stop or self._failed_saves >= MAX_FAILED_SAVES:
                raise
            logger.error(f"{error}. Training goes on; {MAX_FAILED_SAVES} failures in a row would end it.")
            return
        self._failed_saves = 0
        if self.args.stable_after_steps:
            self._unproven.append(folder)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = [*self._unproven[:1], *([Path(best)] if best else [])]
            store.prune(folder.parent, "checkpoint", self.args.save_total_limit, keep)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _write(self, kind: Kind, trial: Any, extra: Mapping[str, Any] | None = None) -> Path:
        """Write the present state as `<kind>-<step>` in the output folder."""
        output_dir = Path(super()._get_output_dir(trial))
        final = output_dir / f"{kind}-{self.state.global_step}"
        staging = output_dir / f"{store.STAGING}{final.name}"
        folder = staging / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"  # transformers appends this name
        with self._all_or_none(final):
            if self.args.should_save:
                reclaim(output_dir)
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        try:
            with self._all_or_none(final):
                self._staging = staging
                super()._save_checkpoint(self.model, trial)
                self._staging = None
                self._save_own_state(folder, staging, extra)
            with self._all_or_none(final):
                if self.args.should_save:
                    store.commit(folder, final)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        return final

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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint on the way, in the background, as `hub_strategy` says; a push still under way goes first.

        In place of transformers', which uploads the output folder: logs and checkpoints of other kinds with it. Not
        while staging: the upload would outlive the folder's name; `_save_checkpoint` asks again afterwards.
        """
        args, pushed = self.args, getattr(self, "push_in_progress", None)
        if self._staging is not None or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = [] if pushed is None or pushed.is_done() else pushed.jobs
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        folder = Path(checkpoint_folder)
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        message = f"Training in progress, step {self.state.global_step}"
        where = (self.hub_model_id, args.hub_token, args.hub_revision)
        jobs = push_in_background(folder, *where, message, whole_as=names.get(args.hub_strategy))
        self.push_in_progress = PushInProgress([*running, *jobs])

    def _save_own_state(self, folder: Path, staging: Path, extra: Mapping[str, Any] | None) -> None:
        save_tree(folder, f"progress_{self.args.process_index}", self._progress())
        if not self.args.should_save:
            return
        moved = self._reference_was_reset or (self.args.sync_ref_model and self.ref_model is not None)
        save_state(folder, self._controls(), self._plain_reference() if moved else None)
        save_tree(folder, resume.RUN_FILE, self.identity.state_dict())
        if extra is not None:
            save_tree(folder, EXTRA_FILE, dict(extra), other=str)
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).is_relative_to(staging):  # this one: name the place it is going to
            self.state.best_model_checkpoint = str(staging.parent / Path(best).name)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        # A pickle of arbitrary objects that nobody needs: the arguments are in run.json.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _progress(self) -> dict[str, Any]:
        """Where this process stands between two steps, and in TRL's generation cycle."""
        cycle = self.args.steps_per_generation * self.num_iterations
        loss = getattr(self, "_tr_loss", None)  # since the last log; neither exists before training starts
        return {
            "step": self._step,
            "buffered_inputs": self._buffered_inputs if self._step % cycle else None,
            "metrics": dict(self._metrics["train"]),
            "entropy_window_stats": self._entropy_window_stats,
            "loss_since_log": loss,
            "last_logged_step": getattr(self, "_globalstep_last_logged", 0),
            "logs": {
                "rows": {name: list(self._logs[name]) for name in ("prompt", "completion", "advantages")},
                "rewards": {name: list(values) for name, values in self._logs["rewards"].items()},
                "extra": {name: list(values) for name, values in self._logs["extra"].items()},
            }
            if self.log_completions
            else None,
        }

    # Resuming

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
            start = resume.on_main_process(main, lambda: self._choose_start(resume_from_checkpoint))
            checkpoint, state, self._learning_rate_factor = start
            self.identity = identity.RunIdentity.from_state(state)
            self.args.run_name = self.identity.run_name
            own = store.list_checkpoints(Path(self.args.output_dir), ("checkpoint",))
            self._unproven = [checkpoint] if checkpoint in own else []
            with self.preemption.watching(), self.identity.tracked():
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def preempted(self) -> bool:
        """Whether a signal has come to any process, after a checkpoint if so; every process must call this."""
        if not self._any(bool(self.preemption.signal)):
            return False
        step = self.state.global_step
        saved = Path(self.args.output_dir, f"checkpoint-{step}").is_dir()
        if step and self._any(self.accelerator.is_main_process and not saved):
            self._save_checkpoint(self.model, None)
        return True

    def admit(self, checkpoint: Path | None, recipe: Mapping[str, Any]) -> None:
        """Hold the run against the one that wrote the checkpoint, before anything is measured, written or trained.

        Args:
            recipe: settings that are not the trainer's but belong to the run; kept in its checkpoints.

        Raises:
            ResumeError: they are two runs; the message names each field that differs.
        """
        self._recipe = dict(recipe)
        fingerprint = self._run_fingerprint()

        def check() -> None:
            if checkpoint is not None:
                resume.compared(checkpoint, fingerprint)

        resume.on_main_process(self.accelerator.is_main_process, check)

    def _run_fingerprint(self) -> dict[str, Any]:
        """Made once, of the weights as they are before training."""
        if self._fingerprint is None and self.accelerator.is_main_process:
            tokenizer, rewards = self.processing_class, self.reward_func_names
            parts = (self.args, self._recipe, self.train_dataset, self._starting_weights(), tokenizer, rewards)
            self._fingerprint = identity.fingerprint(*parts, self.accelerator.num_processes)
        return self._fingerprint or {}

    def _choose_start(self, wanted: str | Path | bool | None) -> tuple[Path | None, dict[str, Any], float]:
        """Checkpoint, identity and learning rate factor of the start; in the main process alone."""
        output_dir = Path(self.args.output_dir)
        checkpoint = store.newest_valid(output_dir) if wanted is True else Path(wanted) if wanted else None
        if wanted is True and checkpoint is None:
            raise resume.ResumeError(f"{output_dir} holds no checkpoint that verifies; train without one")
        fingerprint = self._run_fingerprint()
        if checkpoint is None:
            self.identity = identity.RunIdentity(run_name=self.args.run_name, fingerprint=fingerprint)
            factor = 1.0
        else:
            resume.check_whole(checkpoint)
            recovering = output_dir if self.args.recovery_mode else None
            self.identity, factor = resume.admit(checkpoint, fingerprint, recovering)
            self.identity.run_name = self.args.run_name or self.identity.run_name
        resume.clear_the_way(output_dir, checkpoint)
        return checkpoint, self.identity.state_dict(), factor

    def _starting_weights(self) -> dict[str, torch.Tensor]:
        """The policy's or, with adapters, their base's; nothing where DeepSpeed may have cut them up already."""
        if self.is_deepspeed_enabled:
            return {}
        if hasattr(self.model, "peft_config"):
            return {name: each for name, each in self.model.named_parameters() if not each.requires_grad}
        return self.model.state_dict()

    def _plain_reference(self) -> Any:
        """The reference without wrappers, whose names are those of its weights; None where there is none."""
        if self.ref_model is None:
            return None
        return self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Everything that a checkpoint holds but weights and generators, which transformers restores by itself."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self._reference_was_reset = load_state(folder, self._controls(), self._plain_reference())
        progress = load_tree(folder, f"progress_{self.args.process_index}", self.accelerator.device)
        self._step, self._buffered_inputs = progress["step"], progress["buffered_inputs"]
        self._entropy_window_stats = progress["entropy_window_stats"]
        self._metrics["train"].clear()
        self._metrics["train"].update(progress["metrics"])
        if progress["logs"] is not None and self.log_completions:
            for name, values in progress["logs"]["rows"].items():
                self._logs[name].extend(values)
            for part in ("rewards", "extra"):
                for name, values in progress["logs"][part].items():
                    self._logs[part][name].extend(values)
        self._restored = progress
        LearningRateCut(self._learning_rate_factor, floor=0.0).cut(self.optimizer, self.lr_scheduler)
        if self.identity.new_recoveries:
            resume.tighten_kl(self.kl_controller, self.args.beta_max, self.identity.new_recoveries)
        self.kl_controller.target = self.args.kl_target * resume.RECOVERY_KL_TARGET**self.identity.recoveries

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

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if type(sampler) is not RepeatSampler:
            return sampler
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        self._epoch_sampler = EpochSampler(**{name: getattr(sampler, name) for name in names})
        return self._epoch_sampler

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
        if self._epoch_sampler is not None:
            self._epoch_sampler.epoch = kwargs["epoch"]
        super()._run_epoch(**kwargs)

    # At the end of each step

    def _promote(self) -> None:
        """Make the newest checkpoint stable that enough healthy steps have followed."""
        healthy, step = self.healthy_steps, self.state.global_step
        # One that a fault has followed proves nothing any more.
        self._unproven = [folder for folder in self._unproven if step - store.step_of(folder) <= healthy]
        after = self.args.stable_after_steps
        proven = [folder for folder in self._unproven if step - store.step_of(folder) >= after]
        if not proven:
            return
        self._unproven = self._unproven[self._unproven.index(proven[-1]) + 1 :]
        if self.args.should_save:
            try:
                store.promote(proven[-1], self.args.stable_total_limit)
            except (CheckpointError, OSError) as error:
                logger.error(f"{proven[-1]} is not made stable: {error}")


class _StepEnd(TrainerCallback):
    """Promotes stable checkpoints, and turns a signal to any process into a checkpoint and the end of training."""

    def __init__(self, trainer: CheckpointTrainer):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        trainer = self.trainer
        if not trainer.recovers:  # then nothing looks for faults, and each step passes for a healthy one
            trainer.healthy_steps += 1
        trainer._promote()
        if trainer._any(bool(trainer.preemption.signal)):
            trainer.preemption.signal = trainer.preemption.signal or "a signal to another process"
            logger.warning(f"stopping at step {state.global_step}: {trainer.preemption.signal}")
            control.should_save = control.should_training_stop = True
        return control
