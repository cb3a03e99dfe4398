"""The guard: a step with a NaN or Inf anywhere in it is skipped, undone and followed by another one.

Looked at, on every process, with one decision for all of them:

    before sampling      weights of policy and reference
    while sampling       the logits that are sampled from
    before the update    rewards, gates, loss, controls, norm of the gradient: what is bad never reaches the optimizer
    after the update     weights
    before saving        weights, once more

A skipped step ends like any other: the scheduler, the step counter, the data and the random numbers go on. Weights,
optimizer and controls go back to the last good snapshot, the learning rate is cut, the completions at hand are dropped.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing.attempts import Attempts, LearningRateCut
from rookworld_trl.checkpointing.snapshots import (
    Snapshots,
    copy_tree,
    finite,
    load_optimizer,
    load_tensors,
    numbers_finite,
    trained_tensors,
)
from rookworld_trl.checkpointing.state import Stateful
from rookworld_trl.training.gates import GateResult
from rookworld_trl.training.recovery import FAULTS, Diverged, described, finite_logits, remedy
from rookworld_trl.training.sampler import Samples

logger = logging.get_logger(__name__)

GOOD_STEPS = 3  # healthy ones, after which faults are counted from 0 again
# Faults in which neither the weights nor the learning rate have a part: the step is skipped, and that is all.
WITHOUT_ROLLBACK = {"rewards", "reference"}

Save = Callable[[Literal["debug", "recovery"], Mapping[str, Any]], Path]


class Guard(TrainerCallback):
    """Gets over faults that pass, and ends training with `Diverged` when they do not.

    Args:
        args: the configuration.
        accelerator: every decision is one of all processes.
        policy, reference: the models; no reference with adapters or without KL.
        tokenizer: its `batch_decode` makes what is kept of a broken batch readable.
        controls: what learns from a step's numbers and goes back with the weights, by name.
        learning_rate_cut: what faults have left of the learning rate.
        save: writes a checkpoint of a kind (debug, recovery) beside the regular ones, with something extra in it.
        running_loss: the sum of losses since the last log, of which a skipped step is taken out again.
        on_fault: called once for each fault, before anything goes back, with the step; drops the samples at hand.
        record: takes a metric's name and value.

    Attributes:
        attempts: recoveries since the last stretch of good steps.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        policy: nn.Module,
        reference: nn.Module | None,
        tokenizer: Any,
        controls: Mapping[str, Stateful],
        learning_rate_cut: LearningRateCut,
        *,
        save: Save,
        running_loss: Callable[[], torch.Tensor],
        on_fault: Callable[[int], None],
        record: Callable[[str, float], None],
    ):
        self.args, self.accelerator, self.tokenizer, self.controls = args, accelerator, tokenizer, controls
        self.policy, self.reference = policy, reference
        self.save, self.running_loss, self.on_fault, self.record = save, running_loss, on_fault, record
        self.learning_rate_cut = learning_rate_cut
        self.attempts = Attempts(None)
        self.state, self.optimizer, self.scheduler = TrainerState(), None, None  # those of the run, once it begins
        self._snapshots = Snapshots()
        self._reference_copy: dict[str, torch.Tensor] | None = None
        self._faults: set[str] = set()  # of this process, in the present step
        self._event: dict[str, Any] | None = None  # the present step's fault, once all processes know of it
        self._healthy_steps = 0
        self._loss_broken: torch.Tensor | None = None
        self._loss_before: torch.Tensor | None = None  # the running sum, without the present step
        self._batches: list[dict[str, Any]] = []  # what the present step has computed its loss on

    # What a step goes through, in this order

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Take the starting state, which is good by definition, if it is finite.

        Raises:
            Diverged: it is not.
        """
        self.state, self.optimizer, self.scheduler = state, parts["optimizer"], parts["lr_scheduler"]
        fresh = not (state.global_step or self.args.auto_resume)
        self.attempts = Attempts(Path(args.output_dir) if args.should_save else None, fresh)
        if self.args.recovery_mode:  # a person has looked at those before
            self.attempts.reset()
        # Only the process that writes can read them.
        self.attempts.count = ranks.decided(self.accelerator.is_main_process, lambda: self.attempts.count)
        self._faults.clear()
        self._snapshots, self._event, self._healthy_steps = Snapshots(), None, 0
        self.check_weights()
        self.keep_reference()
        self._snapshots.take(self._present(), state.global_step)
        self._snapshots.promote()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = self.running_loss()
        loss.nan_to_num_(0.0, 0.0, 0.0)  # a sum that was broken before would have every step to come skipped
        self._loss_before = loss.clone()

    def check_weights(self) -> None:
        """Look at the weights of policy and reference: before sampling, and before anything is saved or evaluated."""
        if not finite(self._trained().values()):
            self._faults.add("weights")
        if self.reference is not None and not finite(self.reference.parameters()):
            self._faults.add("reference")
        self._settle()

    @contextmanager
    def sampling(self) -> Iterator[list[Samples]]:
        """Broken logits are noted, not sampled from. The samples are to be put into the list that this gives."""
        drawn: list[Samples] = []
        with finite_logits(self.accelerator.unwrap_model(self.policy)) as repaired:
            yield drawn
        known = (logp for samples in drawn for row in samples.logps if row for logp in row if logp is not None)
        if (repaired and bool(torch.stack(repaired).any())) or not all(map(math.isfinite, known)):
            self._faults.add("sampling")

    def excuses(self, results: list[GateResult]) -> bool:
        """Whether gates that failed have measured NaN: a fault of the moment, not one of the set-up."""
        if all(math.isfinite(result.measured) for result in results):
            return False
        self._faults.add("gates")
        return True

    def saw_batch(self, inputs: dict[str, Any]) -> None:
        self._batches.append(inputs)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """A micro-batch's; looked at when the step's gradient is, so that nothing waits for the device."""
        broken = ~loss.detach().isfinite().all()
        self._loss_broken = broken if self._loss_broken is None else self._loss_broken | broken

    def check_gradient(self, model: nn.Module, norm: Any) -> None:
        """The last look before the update. If the step is skipped, no parameter has a gradient afterwards.

        Without gradients the optimizer's step changes nothing, neither weights nor moments nor its count of steps.
        """
        loss_broken, self._loss_broken = self._loss_broken, None
        running = self.running_loss()
        if (loss_broken is not None and bool(loss_broken)) or not bool(running.isfinite()):
            self._faults.add("loss")
        if not numbers_finite({name: control.state_dict() for name, control in self.controls.items()}):
            self._faults.add("controls")
        # With float16's loss scaling a gradient that overflows is routine, and the scaler leaves the step out.
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            self._faults.add("gradient")
        loss = running if self._loss_before is None else running - self._loss_before
        if self._settle(loss=float(loss), grad_norm=math.nan if norm is None else float(norm)):
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at what the update made of the weights; undo whatever a skipped update may have changed."""
        if self._event is not None:
            if self._event["back_to_step"] is not None:
                self._restore()
            return
        if not finite(self._trained().values()):
            self._faults.add("weights")
        self._settle()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step as healthy, or report what happened to it.

        Raises:
            Diverged: attempts are exhausted.
        """
        step, event, limit = state.global_step, self._event, self.args.recovery_max_attempts
        if event is not None:
            self._healthy_steps = 0
            if self._loss_before is not None:
                self.running_loss().copy_(self._loss_before)
            self._report(event)
            if event["attempt"] > limit:
                allowed = f"`recovery_max_attempts` is {limit}"
                advice = f"That was fault {event['attempt']} in a row and {allowed}. {remedy(event['faults'])}"
                debug = Path(event["debug"]) if event["debug"] else None
                raise Diverged(event["step"], described(event["faults"]), advice, debug)
        else:
            self._healthy_steps += 1
            self._snapshots.promote()
            if self.args.sync_ref_model and step % self.args.ref_model_sync_steps == 0:
                self.keep_reference()
            if self.attempts.count and self._healthy_steps >= GOOD_STEPS:
                self.attempts.reset()
            # The first healthy state is taken in any case: progress since a fault must not wait for the interval.
            if self._healthy_steps == 1 or step % self.args.recovery_snapshot_steps == 0:
                self._snapshots.take(self._present(), step)
        self._faults.clear()
        self._batches.clear()
        self._event = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave finite weights behind, whatever has happened since the last step, and free the snapshots' memory."""
        self.check_weights()
        if self._event is not None:
            self._report(self._event)
        self._faults.clear()
        self._event, self._snapshots = None, Snapshots()

    # Faults

    def _settle(self, **measured: float) -> bool:
        """Whether this step has met a fault, on any process. The first time that is so, go back to the good state."""
        faults = ranks.found_by(self._faults, list(FAULTS), self.accelerator)
        if faults and self._event is None:
            self._recover(faults, measured)
        return bool(faults)

    def _recover(self, faults: dict[str, list[int]], measured: dict[str, float]) -> None:
        """Keep what is broken for inspection, go back to the good state and go on more carefully."""
        step, what = self.state.global_step + 1, described(faults)
        if self._snapshots.good is None:
            raise Diverged(step, what, "There is no good state to go back to: start from other weights")
        attempt = self.attempts.add()  # before anything else that may fail
        self._event = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "faults": faults,
            "attempt": attempt,
            **{name: value if math.isfinite(value) else str(value) for name, value in measured.items()},
        }
        debug = self._save_special("debug", {"event": self._event, "batches": self._batches, **self._texts()})
        self.on_fault(step)
        if self._reference_copy is not None and self.reference is not None and not finite(self.reference.parameters()):
            load_tensors(dict(self.reference.named_parameters()), self._reference_copy)
        back_to = None
        if faults.keys() - WITHOUT_ROLLBACK:
            self.learning_rate_cut.cut(self.optimizer, self.scheduler)
            self._restore()
            back_to = self._snapshots.step
        self._event |= {
            "back_to_step": back_to,
            "learning_rate_scale": self.learning_rate_cut.scale,
            "debug": debug and str(debug),
        }
        if not finite(self._trained().values()):
            raise Diverged(step, f"{what}, and so is the state to go back to", "Resume from a stable checkpoint", debug)

    def _report(self, event: dict[str, Any]) -> None:
        """Keep the state that the run goes on from; the event's log line, and its row in the file."""
        self.record("recovery/attempt", event["attempt"])
        recovery = self._save_special("recovery", {"event": event})
        self.attempts.record({**event, "recovery": recovery and str(recovery)})
        if self.accelerator.is_main_process:
            back = "The weights stay as they are"
            if event["back_to_step"] is not None:
                scale = event["learning_rate_scale"]
                back = f"Back to the state after step {event['back_to_step']}, learning rate x{scale:g} of its schedule"
            kept = f"; the broken state is in {event['debug']}" if event["debug"] else ""
            logger.warning(
                f"step {event['step']} skipped: {described(event['faults'])}. {back}, attempt {event['attempt']} of "
                f"{self.args.recovery_max_attempts}{kept}"
            )

    def _save_special(self, kind: Literal["debug", "recovery"], extra: dict[str, Any]) -> Path | None:
        """A checkpoint outside of the rotation, where the disk allows it."""
        try:
            return self.save(kind, extra)
        except (OSError, RuntimeError) as error:
            logger.warning(f"no {kind} checkpoint: {error}")
            return None

    def _texts(self) -> dict[str, list[str]]:
        """Prompts and completions of the step's batches, to be read by a person."""
        names = {"prompts": "prompt_ids", "completions": "completion_ids"}
        decode = self.tokenizer.batch_decode
        return {name: [text for batch in self._batches for text in decode(batch[key])] for name, key in names.items()}

    # States

    def _trained(self) -> dict[str, torch.Tensor]:
        return trained_tensors(self.accelerator.unwrap_model(self.policy))

    def _present(self) -> dict[str, Any]:
        """What a rollback restores; tensors in place, not copies."""
        return {
            "weights": self._trained(),
            "optimizer": self.optimizer.state_dict(),  # type: ignore[attr-defined]
            "controls": {name: control.state_dict() for name, control in self.controls.items()},
        }

    def _restore(self) -> None:
        """Put the good state in place of whatever there is, and forget what was computed from the latter."""
        good = self._snapshots.good
        load_tensors(self._trained(), good["weights"])
        load_optimizer(self.optimizer, good["optimizer"])
        for name, control in self.controls.items():
            control.load_state_dict(copy_tree(good["controls"][name]))
        self._snapshots.drop()

    def keep_reference(self) -> None:
        """Copy the reference's weights, which nothing but a reset and `sync_ref_model` changes."""
        if self.reference is not None:
            self._reference_copy = copy_tree(dict(self.reference.named_parameters()), self._reference_copy)


def no_rewards(guard: Guard | None, step: int) -> None:
    """No completion of a batch, on any process, has a finite reward: a fault, or without a guard the end of the run."""
    if guard is None:
        raise Diverged(step, f"{FAULTS['rewards']} not finite", remedy(["rewards"]))
    guard._faults.add("rewards")
