"""The trainer's recovery: a step with a NaN or Inf anywhere in it is refused, undone and followed by another one.

Looked at, on every process, with one decision for all of them:

    before sampling      weights of policy and reference
    while sampling       the logits that are sampled from
    before the update    rewards, gates, loss, controls, norm of the gradient: what is bad never reaches the optimizer
    after the update     weights
    before saving        weights, once more

A refused step ends like any other: the scheduler, the step counter, the data and the random numbers go on. Weights,
optimizer and controls go back to the last good snapshot, the learning rate is cut, the completions at hand are dropped.
"""

import math
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from rookworld_trl.checkpointing.state import Stateful
from rookworld_trl.training.gates import GateError
from rookworld_trl.training.mining_trainer import MiningTrainer
from rookworld_trl.training.recovery import (
    FAULTS,
    Attempts,
    Diverged,
    LearningRateCut,
    Snapshots,
    copy_tree,
    described,
    finite,
    finite_logits,
    load_optimizer,
    load_tensors,
    numbers_finite,
    remedy,
    trained_tensors,
)
from rookworld_trl.training.value import ValueHead

logger = logging.get_logger(__name__)

# Controls that learn from a step's numbers and go back with it; the others move on with the data.
_ROLLED_BACK = ("kl_controller", "baseline")
# Faults in which neither the weights nor the learning rate have a part: the step is refused, and that is all.
_APART = {"rewards", "reference"}


class RecoveryTrainer(MiningTrainer):
    """Gets over faults that pass, and ends with `Diverged` when they do not.

    Attributes:
        healthy_steps: optimizer steps since the last fault or the start of this process.
    """

    value_head: ValueHead | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.healthy_steps = 0
        self.recovers = self.args.recovery and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.args.recovery and not self.recovers:
            logger.warning("`recovery` is off: it keeps whole states in memory, and these weights are sharded")
        factor, attempts = self.args.recovery_lr_factor, self.args.recovery_max_attempts
        self.learning_rate_cut = LearningRateCut(factor, floor=factor**attempts)
        self._snapshots = Snapshots()
        self._reference_copy: dict[str, torch.Tensor] | None = None
        self._attempts = Attempts(None)
        self._faults: set[str] = set()  # of this process, in the present step
        self._event: dict[str, Any] | None = None  # the present step's fault, once all processes know of it
        self._loss_broken: torch.Tensor | None = None
        self._loss_before: torch.Tensor | None = None  # the running sum for the log, without the present step
        self._stop_before = ""
        self._step_batches: list[dict[str, Any]] = []  # what the present step has computed its loss on
        if self.recovers:
            self.add_callback(_Steps(self))

    def _controls(self) -> dict[str, Stateful]:
        """What carries state from step to step; layers above add theirs."""
        return {"recovery": self.learning_rate_cut}

    # What a step goes through, in this order

    def begin_training(self) -> None:
        """Take the starting state, which is good by definition, if it is finite.

        Raises:
            Diverged: it is not.
        """
        folder = Path(self.args.output_dir) if self.args.should_save else None
        self._attempts = Attempts(folder, fresh=not (self.state.global_step or self.args.auto_resume))
        if self.args.recovery_mode:  # a person has looked at those before
            self._attempts.reset()
        counted = torch.tensor([self._attempts.count], device=self.accelerator.device)
        self._attempts.count = int(self.accelerator.gather(counted)[0])  # only the first process can read it
        self._faults.clear()
        self._snapshots, self._event, self.healthy_steps = Snapshots(), None, 0
        self._check_weights()
        self._keep_reference()
        self._snapshots.take(self._state(), self.state.global_step)
        self._snapshots.promote()

    def begin_step(self) -> None:
        self._tr_loss.nan_to_num_(0.0, 0.0, 0.0)  # a sum that was broken before would refuse every step to come
        self._loss_before, self._stop_before = self._tr_loss.clone(), self.kl_stop.reason

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A new generation batch, sampled from finite weights."""
        if self.recovers:
            self._check_weights()
        batch = super()._generate_and_score_completions(inputs)
        if "gates" in self._faults:
            self._gates_pending = True  # nothing was measured: the next batch has to pass them
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Sample; broken logits are noted, not sampled from. A completion of no tokens is one that ended at once."""
        watched: Any = finite_logits(self.accelerator.unwrap_model(self.model)) if self.recovers else nullcontext([])
        with watched as mended:
            completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        known = (logp for row in logps or () for logp in row if logp is not None)
        if (mended and bool(torch.stack(mended).any())) or not all(map(math.isfinite, known)):
            self._faults.add("sampling")
        if not all(completion_ids):
            # TRL reads each completion's last token. What the sampler meant can only be the end token.
            empty = sum(not ids for ids in completion_ids)
            logger.warning(
                f"{empty} of {len(completion_ids)} completions have no tokens: taken as their end token alone"
            )
            completion_ids = [ids or [self.eos_token_ids[0]] for ids in completion_ids]
            logps = logps and [row or [math.nan] for row in logps]  # TRL's mark for an unknown one
        return completion_ids, logps

    def _check_gates(self, batch: dict[str, Any]) -> None:
        """A gate that measured NaN has found a fault of the moment, not one of the set-up."""
        try:
            super()._check_gates(batch)
        except GateError as error:
            if not self.recovers or all(math.isfinite(result.measured) for result in error.results):
                raise
            self._faults.add("gates")

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.rewards_unusable and self.model.training:
            self._faults.add("rewards")
            if not self.recovers:
                found = described({"rewards": [self.accelerator.process_index]})
                raise Diverged(self.state.global_step + 1, found, remedy(self._faults))
        return rewards

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if self.recovers and self.model.training:
            self._step_batches.append(inputs)
        return super()._compute_loss(model, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; its loss is looked at when the step's gradient is, so that nothing waits for the device."""
        loss = super().training_step(*args, **kwargs)
        broken = ~loss.detach().isfinite().all()
        self._loss_broken = broken if self._loss_broken is None else self._loss_broken | broken
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; if the step is refused, on any process, no parameter has a gradient afterwards.

        Without gradients the optimizer's step changes nothing, neither weights nor moments nor its count of steps.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.recovers:
            return norm
        loss_broken, self._loss_broken = self._loss_broken, None
        if (loss_broken is not None and bool(loss_broken)) or not bool(self._tr_loss.isfinite()):
            self._faults.add("loss")
        if not numbers_finite(self._control_states()):
            self._faults.add("controls")
        # With float16's loss scaling a gradient that overflows is routine, and the scaler leaves the step out.
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            self._faults.add("gradient")
        loss = self._tr_loss if self._loss_before is None else self._tr_loss - self._loss_before
        if self._confront(loss=float(loss), grad_norm=math.nan if norm is None else float(norm)):
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing broken is saved or evaluated; what is found here refuses the coming step."""
        if self.recovers and (self.control.should_save or self.control.should_evaluate):
            self._check_weights()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def after_update(self) -> None:
        """Look at what the update made of the weights; undo whatever a refused update may have changed."""
        if self._event is not None:
            if self._event["back_to_step"] is not None:
                self._go_back()
            return
        if not finite(self._trained().values()):
            self._faults.add("weights")
        self._confront()

    def end_step(self) -> None:
        """Count the step as healthy, or report what happened to it.

        Raises:
            Diverged: attempts are exhausted.
        """
        step, event = self.state.global_step, self._event
        if event is not None:
            self.healthy_steps = 0
            if self._loss_before is not None:
                self._tr_loss.copy_(self._loss_before)
            self._report(event)
            if event["attempt"] > self.args.recovery_max_attempts:
                allowed = f"`recovery_max_attempts` is {self.args.recovery_max_attempts}"
                advice = f"That was fault {event['attempt']} in a row and {allowed}. {remedy(event['faults'])}"
                debug = Path(event["debug"]) if event["debug"] else None
                raise Diverged(event["step"], described(event["faults"]), advice, debug)
        else:
            self.healthy_steps += 1
            self._snapshots.promote()
            if self.args.sync_ref_model and step % self.args.ref_model_sync_steps == 0:
                self._keep_reference()
            if self._attempts.count and self.healthy_steps >= self.args.recovery_good_steps:
                self._attempts.reset()
            # The first healthy state is taken in any case: progress since a fault must not wait for the interval.
            if self.healthy_steps == 1 or step % self.args.recovery_snapshot_steps == 0:
                self._snapshots.take(self._state(), step)
        self._faults.clear()
        self._step_batches.clear()
        self._event = None

    def end_training(self) -> None:
        """Leave finite weights behind, whatever has happened since the last step, and free the snapshots' memory."""
        self._check_weights()
        if self._event is not None:
            self._report(self._event)
        self._faults.clear()
        self._event, self._snapshots = None, Snapshots()

    # Faults

    def _trained(self) -> dict[str, torch.Tensor]:
        return trained_tensors(self.accelerator.unwrap_model(self.model))

    def _check_weights(self) -> None:
        if not finite(self._trained().values()):
            self._faults.add("weights")
        if self.ref_model is not None and not finite(self.ref_model.parameters()):
            self._faults.add("reference")
        self._confront()

    def _confront(self, **measured: float) -> bool:
        """Whether this step has met a fault, on any process. The first time that is so, go back to the good state."""
        mine = sum(1 << bit for bit, name in enumerate(FAULTS) if name in self._faults)
        everyone = self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device)).tolist()
        ranks = {
            name: [rank for rank, bits in enumerate(everyone) if bits >> bit & 1] for bit, name in enumerate(FAULTS)
        }
        faults = {name: found for name, found in ranks.items() if found}
        if faults and self._event is None:
            self._recover(faults, measured)
        return bool(faults)

    def _recover(self, faults: dict[str, list[int]], measured: dict[str, float]) -> None:
        """Keep what is broken for inspection, go back to the good state and go on more carefully."""
        step, what = self.state.global_step + 1, described(faults)
        if self._snapshots.good is None:
            raise Diverged(step, what, "There is no good state to go back to: start from other weights")
        attempt = self._attempts.add()  # before anything else that may fail
        self._event = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "faults": faults,
            "attempt": attempt,
            **{name: value if math.isfinite(value) else str(value) for name, value in measured.items()},
        }
        debug = self._save_special("debug", {"event": self._event, "batches": self._step_batches, **self._texts()})
        self._buffered_inputs, back_to = None, None
        self._mend_reference()
        if faults.keys() - _APART:
            self.learning_rate_cut.cut(self.optimizer, self.lr_scheduler)
            self._go_back()
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
        self._metrics["train"]["recovery/attempt"].append(event["attempt"])
        recovery = self._save_special("recovery", {"event": event})
        self._attempts.record({**event, "recovery": recovery and str(recovery)})
        if self.accelerator.is_main_process:
            back = "The weights stay as they are"
            if event["back_to_step"] is not None:
                scale = event["learning_rate_scale"]
                back = f"Back to the state after step {event['back_to_step']}, learning rate x{scale:g} of its schedule"
            kept = f"; the broken state is in {event['debug']}" if event["debug"] else ""
            logger.warning(
                f"step {event['step']} refused: {described(event['faults'])}. {back}, attempt {event['attempt']} of "
                f"{self.args.recovery_max_attempts}{kept}"
            )

    def _save_special(self, kind: str, extra: dict[str, Any]) -> Path | None:
        """A checkpoint outside of the rotation, where the layer above can write one and the disk allows it."""
        save = getattr(self, "save_special", None)
        if save is None:
            return None
        try:
            return save(kind, extra)
        except (OSError, RuntimeError) as error:
            logger.warning(f"no {kind} checkpoint: {error}")
            return None

    def _texts(self) -> dict[str, list[str]]:
        """Prompts and completions of the step's batches, to be read by a person."""
        decode = self.processing_class.batch_decode
        names = {"prompts": "prompt_ids", "completions": "completion_ids"}
        return {name: [text for b in self._step_batches for text in decode(b[key])] for name, key in names.items()}

    # States

    def _control_states(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self._controls().items() if name in _ROLLED_BACK}

    def _state(self) -> dict[str, Any]:
        """What a rollback restores; tensors in place, not copies."""
        head = getattr(self, "value_head", None)
        return {
            "weights": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "controls": self._control_states(),
            "entropy": (self.entropy_coef, self._last_world_entropy),
            "value_head": None if head is None else (head.net.state_dict(), head.optimizer.state_dict()),
        }

    def _go_back(self) -> None:
        """Put the good state in place of whatever there is, and forget what was computed from the latter."""
        good = self._snapshots.good
        load_tensors(self._trained(), good["weights"])
        load_optimizer(self.optimizer, good["optimizer"])
        for name, control in self._controls().items():
            if name in good["controls"]:
                control.load_state_dict(copy_tree(good["controls"][name]))
        self.entropy_coef, self._last_world_entropy = good["entropy"]
        self._entropy_window_stats = None
        if good["value_head"] is not None and self.value_head is not None:
            net, optimizer = good["value_head"]
            self.value_head.net.load_state_dict(net)
            load_optimizer(self.value_head.optimizer, optimizer)
        self._snapshots.drop()
        self.kl_stop.reason = self._stop_before  # a stop on numbers that were not real

    def _mend_reference(self) -> None:
        if self._reference_copy is not None and not finite(self.ref_model.parameters()):
            load_tensors(dict(self.ref_model.named_parameters()), self._reference_copy)

    def _keep_reference(self) -> None:
        """Copy the reference's weights, which nothing but a reset and `sync_ref_model` changes."""
        if self.ref_model is not None:
            self._reference_copy = copy_tree(dict(self.ref_model.named_parameters()), self._reference_copy)

    def _reset_reference(self) -> None:
        super()._reset_reference()
        if self.recovers:
            self._keep_reference()


class _Steps(TrainerCallback):
    """Calls the trainer at the points of its loop that have no method to override."""

    def __init__(self, trainer: RecoveryTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_training()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.after_update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.end_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer.end_training()
