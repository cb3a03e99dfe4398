"""A step with a NaN or Inf anywhere in it is skipped, undone and followed by another one.

Looked at, on every process, with one decision for all of them:

    before sampling      weights
    while sampling       the logits that are sampled from
    before the update    rewards, loss, norm of the gradient: what is bad never reaches the optimizer
    after the update     weights
    before saving        weights, once more

A skipped step ends like any other: the scheduler, the step counter, the data and the random numbers go on. Weights,
optimizer and controls go back to the last good snapshot, the learning rate is cut, the completions at hand are dropped.
The idea is PaLM's (arXiv 2204.02311, section 5.1: go back to before the loss spike and skip its batches), without the
disk.
"""

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing.resume import scale_learning_rate
from rookworld_trl.checkpointing.stopping import UNRECOVERABLE
from rookworld_trl.checkpointing.store import Remembers, Stateful
from rookworld_trl.files import append_line
from rookworld_trl.modeling.hooks import finite_logits
from rookworld_trl.training.sampler import Samples

logger = logging.get_logger(__name__)

GOOD_STEPS = 3  # healthy ones, after which faults are counted from 0 again
EVENTS_FILE = "recovery.jsonl"
RATE_AFTER_FAULT = 0.5
# What can be found not finite, in the order in which an optimizer step meets it.
FAULTS = {
    "weights": "weights",
    "sampling": "sampling logits",
    "rewards": "rewards of all completions",
    "loss": "loss",
    "gradient": "gradient",
}
NO_REWARDS = (
    "No reward function gave a finite number for any completion: see that they apply to these prompts (None means that "
    "one does not) and fix them"
)


class Diverged(RuntimeError):  # noqa: N818 - a verdict on the run, not a mistake
    """A step was not finite once more than `recovery_max_attempts` allows, or there was no state to go back to.

    The model holds the last good weights, if there were any, when this is raised.

    Attributes:
        step: the optimizer step that was skipped.
    """

    exit_code = UNRECOVERABLE

    def __init__(self, step: int, what: str, remedy: str):
        self.step = step
        super().__init__(f"training diverged at step {step}: {what}. {remedy}")


class Snapshots:
    """The last good state, and a newer one that has yet to prove itself; their memory is allocated once.

    A state counts as good only when a whole step has gone well with it: weights that make the next loss NaN may look
    healthy by themselves.

    Attributes:
        good: the state to go back to; None before the first one.
        step: the optimizer step after which it was taken.
    """

    def __init__(self) -> None:
        self.good: Any = None
        self.step = 0
        self._other: Any = None  # the candidate, or memory that waits for one
        self._candidate: int | None = None  # its step

    def take(self, state: Any, step: int) -> None:
        """Copy `state` (nested containers of tensors and values) as a candidate, in place of an earlier one."""
        self._other, self._candidate = copy_tree(state, self._other), step

    def promote(self) -> None:
        """The candidate, if there is one, is good."""
        if self._candidate is not None:
            self.good, self._other = self._other, self.good
            self.step, self._candidate = self._candidate, None

    def drop(self) -> None:
        """Forget the candidate."""
        self._candidate = None


class Guard(Remembers, TrainerCallback):
    """Gets over faults that pass, and ends training with `Diverged` when they do not.

    Args:
        trainer: a `RookWorldGRPOTrainer`; every decision is one of all its processes.
        controls: what learns from a step's numbers and goes back with the weights, by name.

    Attributes:
        attempts: faults in a row.
        faults: what this process has found in the present step, of `FAULTS`.
        event: the present step's fault, once all processes know of it.
        scale: the share of the learning rate's schedule that faults have left, which checkpoints keep as they do the
            cut schedule. Each halves it, but at most so many times: faults that have nothing to do with the rate must
            not end up switching learning off.
    """

    REMEMBERED = ("scale",)

    def __init__(self, trainer: Any, controls: Mapping[str, Stateful]):
        self.trainer, self.controls = trainer, controls
        self.allowed: int = trainer.args.recovery_max_attempts
        self.attempts, self.scale = 0, 1.0
        self.event: dict[str, Any] | None = None
        self._snapshots = Snapshots()
        self.faults: set[str] = set()
        self._healthy_steps = 0
        self._loss_before = torch.tensor(0.0)  # the running sum, without the present step

    # What a step goes through, in this order

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the starting state, which is good by definition, if it is finite.

        Raises:
            Diverged: it is not.
        """
        self.faults.clear()
        self._snapshots, self.event, self._healthy_steps, self.attempts = Snapshots(), None, 0, 0
        self.check_weights()
        self._snapshots.take(self._present(), state.global_step)
        self._snapshots.promote()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = self.trainer._tr_loss
        loss.nan_to_num_(0.0, 0.0, 0.0)  # a sum that was broken before would have every step to come skipped
        self._loss_before = loss.clone()

    def check_weights(self) -> None:
        """Look at the weights: before sampling, after the update, and before anything is saved or evaluated."""
        if not finite(self._trained().values()):
            self.faults.add("weights")
        self._settle()

    @contextmanager
    def sampling(self) -> Iterator[list[Samples]]:
        """Broken logits are noted, not sampled from. The samples are to be put into the list that this gives."""
        drawn: list[Samples] = []
        watched: Any = nullcontext([])
        if self.trainer.sampler.backend == "transformers":  # the native one draws from NaN without harm
            watched = finite_logits(self.trainer.accelerator.unwrap_model(self.trainer.model))
        with watched as repaired:
            yield drawn
        known = (logp for samples in drawn for row in samples.logps if row for logp in row if logp is not None)
        if (repaired and bool(torch.stack(repaired).any())) or not all(map(math.isfinite, known)):
            self.faults.add("sampling")

    def check_gradient(self, model: nn.Module, norm: Any) -> None:
        """The last look before the update. If the step is skipped, no parameter has a gradient afterwards.

        Without gradients the optimizer's step changes nothing, neither weights nor moments nor its count of steps.
        """
        if not self.trainer._tr_loss.isfinite():  # of all its micro-batches
            self.faults.add("loss")
        # With float16's loss scaling a gradient that overflows is routine, and the scaler leaves the step out.
        if self.trainer.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            self.faults.add("gradient")
        if self._settle():
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at what the update made of the weights; undo whatever a skipped update may have changed."""
        if self.event is None:
            self.check_weights()
        elif self.event["back_to_step"] is not None:
            self._restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step as healthy, or report what happened to it.

        Raises:
            Diverged: attempts are exhausted.
        """
        if self.event is not None:
            self._healthy_steps = 0
            self.trainer._tr_loss.copy_(self._loss_before)
            self._report(self.event)
        else:
            self._healthy_steps += 1
            self._snapshots.promote()
            if self._healthy_steps >= GOOD_STEPS:
                self.attempts = 0
            # The first healthy state is taken in any case: progress since a fault must not wait for the interval.
            if self._healthy_steps == 1 or state.global_step % args.recovery_snapshot_steps == 0:
                self._snapshots.take(self._present(), state.global_step)
        self.faults.clear()
        self.event = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave finite weights behind, whatever has happened since the last step, and free the snapshots' memory."""
        self.check_weights()
        if self.event is not None:
            self._report(self.event)
        self.faults.clear()
        self.event, self._snapshots = None, Snapshots()

    # Faults

    def _settle(self) -> bool:
        """Whether this step has met a fault, on any process. The first time that is so, go back to the good state."""
        everywhere = ranks.largest([float(name in self.faults) for name in FAULTS], self.trainer.accelerator)
        faults = [name for name, found in zip(FAULTS, everywhere, strict=True) if found]
        if faults and self.event is None:
            self._recover(faults)
        return bool(faults)

    def _recover(self, faults: list[str]) -> None:
        """Go back to the good state and go on more carefully."""
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        what = f"{' and '.join(FAULTS[name] for name in faults)} not finite"
        if self._snapshots.good is None:
            raise Diverged(step, what, "There is no good state to go back to: start from other weights")
        self.attempts += 1
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self.event = {"time": time, "step": step, "what": what, "faults": faults, "attempt": self.attempts}
        self.event["back_to_step"] = None
        trainer._buffered_inputs = None  # computed from the state before: new samples are drawn
        if faults != ["rewards"]:  # in which neither the weights nor the learning rate have a part
            lowered = max(RATE_AFTER_FAULT**self.allowed, self.scale * RATE_AFTER_FAULT)
            scale_learning_rate(trainer.optimizer, trainer.lr_scheduler, lowered / self.scale)
            self.scale = lowered
            self._restore()
            self.event["back_to_step"] = self._snapshots.step
        self.event["learning_rate_scale"] = self.scale

    def _report(self, event: dict[str, Any]) -> None:
        """The event's log line, and its row in the file.

        Raises:
            Diverged: it was one too many.
        """
        self.trainer.record("recovery/attempt", event["attempt"])
        if self.trainer.args.should_save:
            try:
                append_line(Path(self.trainer.args.output_dir, EVENTS_FILE), json.dumps(event))
            except OSError as error:
                logger.warning(f"{EVENTS_FILE} cannot be written ({error}); training goes on")
            back = "The weights stay as they are"
            if event["back_to_step"] is not None:
                scale = event["learning_rate_scale"]
                back = f"Back to the state after step {event['back_to_step']}, learning rate x{scale:g} of its schedule"
            logger.warning(
                f"step {event['step']} skipped: {event['what']}. {back}, attempt {event['attempt']} of {self.allowed}"
            )
        if event["attempt"] > self.allowed:
            remedy = (
                NO_REWARDS
                if "rewards" in event["faults"]
                else "Resume with `--recovery_mode`, or lower `learning_rate`"
            )
            advice = (
                f"That was fault {event['attempt']} in a row and `recovery_max_attempts` is {self.allowed}. {remedy}"
            )
            raise Diverged(event["step"], event["what"], advice)

    # States

    def _trained(self) -> dict[str, torch.Tensor]:
        """What training changes in the policy: parameters with gradients, and floating-point buffers."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        tensors = {name: each for name, each in model.named_parameters() if each.requires_grad}
        return tensors | {name: each for name, each in model.named_buffers() if each.is_floating_point()}

    def _present(self) -> dict[str, Any]:
        """What a rollback restores; tensors in place, not copies."""
        return {
            "weights": self._trained(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "controls": {name: control.state_dict() for name, control in self.controls.items()},
        }

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the good state in place of whatever there is, and forget what was computed from the latter."""
        good = self._snapshots.good
        for name, tensor in self._trained().items():
            tensor.copy_(good["weights"][name])
        optimizer = self.trainer.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]  # those in force stay
        optimizer.load_state_dict(copy_tree(good["optimizer"]))  # it keeps tensors, so it gets its own
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, control in self.controls.items():
            control.load_state_dict(copy_tree(good["controls"][name]))
        self._snapshots.drop()


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element of any tensor is NaN or Inf; one synchronisation with the device."""
    # The largest absolute value: unlike a sum, it cannot overflow by itself.
    norm = get_total_norm([t.detach() for t in tensors if t.is_floating_point() and t.numel()], norm_type=math.inf)
    return bool(norm.isfinite())


def copy_tree(tree: Any, into: Any = None) -> Any:
    """A copy of nested dicts, lists and tuples with their tensors on the CPU, in the tensors of `into` where they fit.

    Args:
        into: an earlier copy that is no longer needed.
    """
    if isinstance(tree, torch.Tensor):
        fits = isinstance(into, torch.Tensor) and into.shape == tree.shape and into.dtype == tree.dtype
        kept = into if fits else torch.empty_like(tree, device="cpu", requires_grad=False)
        return kept.copy_(tree.detach())
    if isinstance(tree, Mapping):
        old = into if isinstance(into, Mapping) else {}
        return {key: copy_tree(value, old.get(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        old_items = list(into) if isinstance(into, list | tuple) and len(into) == len(tree) else [None] * len(tree)
        return type(tree)(copy_tree(value, old) for value, old in zip(tree, old_items, strict=True))
    return copy.deepcopy(tree)
