"""The durable GRPO trainer: a run is interrupted and goes on exactly, at any step.

It knows where TRL stands between two steps, and nothing of what the layer above computes in one.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from rookworld_trl import ranks
from rookworld_trl.checkpointing import resume, store
from rookworld_trl.checkpointing.durable import DurableTrainer, as_it_generates
from rookworld_trl.checkpointing.store import (
    MODEL_FOLDER,
    RESCUED_FOLDER,
    CheckpointError,
    Stateful,
    load_tree,
    save_tree,
)
from rookworld_trl.modeling.hub import check_write, explained

logger = logging.get_logger(__name__)

STATE_FILE = "rookworld_state"  # .json, .safetensors: every control
REFERENCE_FILE = "reference.safetensors"  # where it is no longer the one of the start

# Takes the policy as a plain model and the held-out rows; a metric that is not defined on them is NaN.
Evaluator = Callable[[PreTrainedModel, Any], Mapping[str, float]]


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


class DurableGRPOTrainer(DurableTrainer, GRPOTrainer):
    """Resumes TRL's trainer bit for bit on the same CPU.

    Beyond what every `DurableTrainer` keeps, a checkpoint holds the place in TRL's generation cycle with its
    completions, every control, and a reference that is no longer the one of the start.

    Attributes:
        controls: whatever carries state from step to step, by its name in a checkpoint; the layer above fills it in.
        evaluator: see `watch_with`.
    """

    evaluator: Evaluator | None = None
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.controls: dict[str, Stateful] = {}
        self._epoch_sampler: EpochSampler | None = None

    def facts(self) -> dict[str, Any]:
        args, weights = self.args, self.model.state_dict()
        if hasattr(self.model, "peft_config"):  # the adapters' base
            weights = {name: each for name, each in self.model.named_parameters() if not each.requires_grad}
        weights = {} if self.is_deepspeed_enabled else weights  # it may have cut them up already
        return {
            "rewards": list(self.reward_func_names),
            "train_dataset": resume.dataset_digests(self.train_dataset, ordered=not args.shuffle_dataset),
            "starting_weights": resume.weights_digest(weights) if weights else None,
            "model_commit": getattr(self.model.config, "_commit_hash", None),  # of a model from the Hub
            "tokenizer": resume.tokenizer_digest(self.processing_class),
            # In which the place of a checkpoint is counted.
            "batches": [args.per_device_train_batch_size, self.num_generations, args.steps_per_generation],
            "accumulation": [args.gradient_accumulation_steps, self.num_iterations],
        }

    @property
    def sharded(self) -> bool:
        """Whether no process has all weights."""
        return ranks.sharded(self.accelerator)

    # Held-out metrics on the way

    def watch_with(self, evaluator: Evaluator) -> None:
        """Measure the policy on `eval_dataset` by this, in the main process, and not by the rewards of samples.

        Where the weights are in shards, no process has all of them: nothing is measured on the way, the last checkpoint
        is taken in place of the best one, and a line says so.

        Args:
            evaluator: takes the policy as a plain model and the rows, and returns metrics by name, such as
                `{"score": 0.5}`, which is logged as `eval_score`; a metric that is not defined on them is NaN.
        """
        if not self.sharded:
            self.evaluator = evaluator
            return
        args: Any = self.args
        if self.accelerator.is_main_process:
            logger.warning(
                "`eval_strategy` and `load_best_model_at_end` are off in this run: its weights are in shards, and no "
                "process has all of them to measure on the way"
            )
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        args.metric_for_best_model = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the policy as it is, and log it; training goes on as if nothing had been measured."""
        with _undisturbed(self.model):
            if self.evaluator is None:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            main, found = self.accelerator.is_main_process, {}
            with ranks.others_wait():
                if main:
                    rows = self.eval_dataset if eval_dataset is None else eval_dataset
                    found = dict(self.evaluator(self.merged_model(), rows))
            found = ranks.decided(main, lambda: found)
            metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()}
            self.log(metrics | self._best(metrics, metric_key_prefix))  # in evaluation mode: training's wait for theirs
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    def _best(self, metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
        """`best` and `best_step` with these metrics, where one of them chooses; transformers only knows afterwards."""
        args, best, step = self.args, self.state.best_metric, self.state.best_global_step
        chosen = args.metric_for_best_model or ""
        value = metrics.get(chosen if chosen.startswith("eval_") else f"eval_{chosen}", float("nan"))
        if value == value and (best is None or (value > best if args.greater_is_better else value < best)):
            best, step = value, self.state.global_step
        known = chosen and best is not None and step is not None
        return {f"{prefix}_best": best, f"{prefix}_best_step": float(step)} if known else {}

    @property
    def outcome(self) -> dict[str, Any]:
        """How far the run came, of which step its weights are, and what stopped it, if anything did."""
        return {"steps": self.state.global_step, "best_step": self.best_step, "stop_reason": self.stop_reason}

    @property
    def best_step(self) -> int | None:
        """The step whose weights the trained model has, where `load_best_model_at_end` has put them back."""
        best = self.state.best_model_checkpoint
        return store.step_of(Path(best)) if best and self.args.load_best_model_at_end else None

    # Writing

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing is pushed on the way: transformers' would upload the output folder, logs and arguments with it."""

    def _write_parts(self, folder: Path) -> None:
        super()._write_parts(folder)
        save_tree(folder, STATE_FILE, {name: control.state_dict() for name, control in self.controls.items()})
        if self.args.sync_ref_model:
            save_model(self._plain_reference(), str(folder / REFERENCE_FILE))

    def progress(self) -> dict[str, Any]:
        """Also where this process stands in TRL's generation cycle."""
        unused = self._buffered_inputs if self._step % (self.args.steps_per_generation * self.num_iterations) else None
        return {"step": self._step, "buffered_inputs": unused, **super().progress()}

    # Resuming

    def _plain_reference(self) -> Any:
        """The reference without wrappers, whose names are those of its weights."""
        return self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        states = load_tree(Path(checkpoint), STATE_FILE, self.accelerator.device)
        for name, control in self.controls.items():
            try:
                control.load_state_dict(states[name])
            except KeyError as missing:
                where = f"{checkpoint}/{STATE_FILE}.json"
                raise ValueError(f"{where}: field {missing} is missing; {store.REMEDY}") from missing
        moved = Path(checkpoint, REFERENCE_FILE)
        if moved.exists() and self.ref_model is not None:
            load_model(self._plain_reference(), str(moved))
        self._step, self._buffered_inputs = self._restored["step"], self._restored["buffered_inputs"]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if type(sampler) is not RepeatSampler:
            return sampler
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        self._epoch_sampler = EpochSampler(**{name: getattr(sampler, name) for name in names})
        return self._epoch_sampler

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._epoch_sampler is not None:
            self._epoch_sampler.epoch = kwargs["epoch"]
        super()._run_epoch(**kwargs)

    # The trained model

    def merged_model(self) -> PreTrainedModel:
        """The policy as a plain model: itself or, where adapters train, a copy of the base with them merged into it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "merge_and_unload"):
            return model
        merged = copy.deepcopy(model).merge_and_unload()
        merged.__dict__.pop("forward", None)  # TRL's, which is bound to the original
        return merged

    def save_merged(self, folder: str | Path) -> None:
        """Save the policy and its tokenizer so that they load without peft. Nothing is pushed."""
        if not hasattr(self.accelerator.unwrap_model(self.model), "merge_and_unload"):
            self.save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            with as_it_generates(merged := self.merged_model()):
                merged.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def write_model(self) -> None:
        """Write the policy so into `checkpoint/` of the output folder, whole or not at all, with a manifest.

        A disk that was full for a moment gets a second try. After that the model goes to `checkpoint.rescued`, beside
        it or, where there is no room, in the folder of temporary files: a run without checkpoints has it nowhere else.

        Raises:
            CheckpointError: it could not be written; the message says where it was kept.
        """
        place, first = Path(self.args.output_dir), None
        temporary = Path(tempfile.gettempdir(), f"{place.name}-{RESCUED_FOLDER}")
        for final in (place / MODEL_FOLDER, place / MODEL_FOLDER, place / RESCUED_FOLDER, temporary):
            try:
                with self._staged(final) as folder:
                    self.save_merged(folder)
            except CheckpointError as error:
                first = first or error
                continue
            if first is not None and final.name != MODEL_FOLDER:
                raise CheckpointError(f"{first}. The trained model is whole in {final}") from first
            return
        raise CheckpointError(f"{first}. The trained model could not be kept anywhere else") from first

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """All of a run: signals are watched for, and in the end it is closed."""
        with closing(self), self.preemption.watching():
            yield

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository, with errors that say what to do."""
        with explained(self.args.hub_model_id or Path(self.args.output_dir).name, "nothing has been trained yet"):
            super().init_hf_repo(*args, **kwargs)
            check_write(self.hub_model_id, self.args.hub_token)

    def close(self) -> None:
        """End a vLLM engine in this process; left to the interpreter, it ends after the process group that it needs."""
        engine = getattr(getattr(self, "vllm_generation", None), "llm", None)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in evaluation mode; every generator of random numbers then goes on as before."""
    training, own, numbers = model.training, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numbers)
        model.train(training)
