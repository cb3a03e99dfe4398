"""A step with a NaN or Inf anywhere in it is skipped, undone and followed by another one.

Looked at, on every process, with one decision for all of them:

    before sampling      weights of policy and reference
    while sampling       the logits that are sampled from
    before the update    rewards, gates, loss, controls, norm of the gradient: what is bad never reaches the optimizer
    after the update     weights
    before saving        weights, once more

A skipped step ends like any other: the scheduler, the step counter, the data and the random numbers go on. Weights,
optimizer and controls go back to the last good snapshot, the learning rate is cut, the completions at hand are dropped.
The idea is PaLM's (arXiv 2204.02311, section 5.1: go back to before the loss spike and skip its batches), without the
disk.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing.resume import counts_in, keep_counts, scale_learning_rate
from rookworld_trl.checkpointing.state import Remembers, Stateful, copy_tree, finite, numbers_finite
from rookworld_trl.checkpointing.stopping import UNRECOVERABLE
from rookworld_trl.files import append_line
from rookworld_trl.modeling.hooks import hooked
from rookworld_trl.training.gates import GateResult
from rookworld_trl.training.sampler import Samples

logger = logging.get_logger(__name__)

GOOD_STEPS = 3  # healthy ones, after which faults are counted from 0 again
ATTEMPTS_FILE = "recovery.json"
EVENTS_FILE = "recovery.jsonl"
RATE_AFTER_FAULT = 0.5

# What can be found not finite, in the order in which an optimizer step meets it.
FAULTS = {
    "weights": "weights",
    "reference": "reference weights",
    "sampling": "sampling logits",
    "rewards": "rewards of all completions",
    "gates": "first batch's log-probs",
    "loss": "loss",
    "controls": "controls",
    "gradient": "gradient",
}
# Those in which neither the weights nor the learning rate have a part: the step is skipped, and that is all.
WITHOUT_ROLLBACK = {"rewards", "reference"}


class Diverged(RuntimeError):  # noqa: N818 - a verdict on the run, not a mistake
    """A step was not finite once more than `recovery_max_attempts` allows, or there was no state to go back to.

    The model holds the last good weights, if there were any, when this is raised.

    Attributes:
        step: the optimizer step that was skipped.
        debug: folder with the broken state and its batch; None if none could be written.
    """

    exit_code = UNRECOVERABLE

    def __init__(self, step: int, what: str, remedy: str, debug: Path | None = None):
        self.step, self.debug = step, debug
        kept = f" The broken state and its batch are in {debug}." if debug else ""
        super().__init__(f"training diverged at step {step}: {what}.{kept} {remedy}")


def _described(faults: dict[str, list[int]]) -> str:
    """`loss and gradient not finite (process 1)`, with the processes that found it."""
    names = [FAULTS[name] for name in FAULTS if name in faults]
    ranks = sorted({rank for found in faults.values() for rank in found})
    where = f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return f"{' and '.join(names)} not finite ({where})"


def remedy(faults: Iterable[str]) -> str:
    """What to do about faults that come again and again. Of several, the first one's: the others may follow from it."""
    if "rewards" in faults:
        return (
            "No reward function gave a finite number for any completion: see that they apply to these prompts (None "
            "means that one does not) and fix them"
        )
    if "reference" in faults:
        return "Nothing trains the reference: check the machine's memory, then go on with `--auto_resume`"
    return "Resume with `--recovery_mode`, which counts its attempts from 0, or lower `learning_rate`"


@contextmanager
def finite_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Let `generate` sample from equal chances where a row's logits are no distribution, and tell.

    Sampling from NaN raises on a CPU, and on a GPU it ends the process's use of the device for good (pytorch#7647), so
    that nothing could be saved or rolled back.

    Yields:
        A list of tensors, one a forward pass, each True if a row had to be repaired; reading them waits for the device.
    """
    repaired: list[torch.Tensor] = []

    def repair(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        usable = logits.amax(dim=-1, keepdim=True).isfinite()  # not with a NaN or +Inf, nor if all are -Inf
        repaired.append(~usable.all())
        return torch.where(usable, logits, 0.0)

    with hooked(model.get_output_embeddings(), repair):  # type: ignore[operator]
        yield repaired


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


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` that leaves `state` alone and the learning rates in force."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(copy_tree(state))  # it keeps tensors that are on the right device, so it gets its own
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def _load_tensors(target: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(saved[name])


class Attempts:
    """Recoveries since the last stretch of good steps, in a file that no checkpoint holds or restores.

    A count inside a checkpoint would start at 0 whenever a run dies and resumes, and a run that always dies at the same
    step would go on for ever.

    Args:
        folder: the run's; None on processes that write nothing.
        fresh: forget what an earlier run in this folder has counted.

    Attributes:
        count: attempts in a row, those of earlier processes included.
    """

    def __init__(self, folder: Path | None, fresh: bool = False):
        self.folder = folder
        counts = counts_in(folder / ATTEMPTS_FILE) if folder else {}
        self.count, self._total = counts.get("attempts", 0), counts.get("total", 0)
        if fresh and counts:
            self._total = 0
            self.set(0)

    def set(self, count: int) -> None:
        """So many in a row from here on: one more than before, or 0 once the run is healthy again."""
        self._total += count > self.count
        self.count = count
        if self.folder:
            keep_counts(self.folder / ATTEMPTS_FILE, {"attempts": count, "total": self._total})

    def record(self, event: Mapping[str, Any]) -> None:
        """Append an event to `recovery.jsonl`; a full disk must not end a run that is just being saved."""
        if self.folder:
            try:
                append_line(self.folder / EVENTS_FILE, json.dumps(event))
            except OSError as error:
                logger.warning(f"{self.folder / EVENTS_FILE} cannot be written ({error}); training goes on")


class LearningRateCut(Remembers):
    """The share of the schedule that is left after recoveries; travels in checkpoints, as the cut schedule does.

    Attributes:
        scale: 1 before the first recovery; each halves it, but at most so many times: faults that have nothing to do
            with the rate must not end up switching learning off.
    """

    REMEMBERED = ("scale",)

    def __init__(self, times: int):
        self.floor, self.scale = RATE_AFTER_FAULT**times, 1.0

    def cut(self, optimizer: Any, scheduler: Any) -> None:
        """Lower the rate in force and those the schedule is going to set."""
        lowered = max(self.floor, self.scale * RATE_AFTER_FAULT)
        ratio, self.scale = lowered / self.scale, lowered
        scale_learning_rate(optimizer, scheduler, ratio)


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
        save: Callable[[Literal["debug", "recovery"], Mapping[str, Any]], Path],
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
        self.event: dict[str, Any] | None = None  # the present step's fault, once all processes know of it
        self._healthy_steps = 0
        self._loss_broken = torch.tensor(False)
        self._loss_before = torch.tensor(0.0)  # the running sum, without the present step
        self._batches: list[dict[str, Any]] = []  # what the present step has computed its loss on

    # What a step goes through, in this order

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Take the starting state, which is good by definition, if it is finite.

        Raises:
            Diverged: it is not.
        """
        self.state, self.optimizer, self.scheduler = state, parts["optimizer"], parts["lr_scheduler"]
        folder = Path(args.output_dir) if args.should_save else None
        self.attempts = Attempts(folder, fresh=not (state.global_step or self.args.auto_resume))
        if self.args.recovery_mode:  # a person has looked at those before
            self.attempts.set(0)
        # Only the process that writes can read them.
        self.attempts.count = ranks.decided(self.accelerator.is_main_process, lambda: self.attempts.count)
        self._faults.clear()
        self._snapshots, self.event, self._healthy_steps = Snapshots(), None, 0
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
        self._loss_broken = self._loss_broken | ~loss.detach().isfinite().all()

    def check_gradient(self, model: nn.Module, norm: Any) -> None:
        """The last look before the update. If the step is skipped, no parameter has a gradient afterwards.

        Without gradients the optimizer's step changes nothing, neither weights nor moments nor its count of steps.
        """
        running = self.running_loss()
        if self._loss_broken or not running.isfinite():
            self._faults.add("loss")
        self._loss_broken = torch.tensor(False)
        if not numbers_finite({name: control.state_dict() for name, control in self.controls.items()}):
            self._faults.add("controls")
        # With float16's loss scaling a gradient that overflows is routine, and the scaler leaves the step out.
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            self._faults.add("gradient")
        loss = float(running - self._loss_before)
        if self._settle(loss=loss, grad_norm=math.nan if norm is None else float(norm)):
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at what the update made of the weights; undo whatever a skipped update may have changed."""
        if self.event is not None:
            if self.event["back_to_step"] is not None:
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
        step, event = state.global_step, self.event
        if event is not None:
            self._healthy_steps = 0
            self.running_loss().copy_(self._loss_before)
            self._report(event)
            if event["attempt"] > self.args.recovery_max_attempts:
                allowed = f"`recovery_max_attempts` is {self.args.recovery_max_attempts}"
                advice = f"That was fault {event['attempt']} in a row and {allowed}. {remedy(event['faults'])}"
                debug = Path(event["debug"]) if event["debug"] else None
                raise Diverged(event["step"], _described(event["faults"]), advice, debug)
        else:
            self._healthy_steps += 1
            self._snapshots.promote()
            if self.args.sync_ref_model and step % self.args.ref_model_sync_steps == 0:
                self.keep_reference()
            if self.attempts.count and self._healthy_steps >= GOOD_STEPS:
                self.attempts.set(0)
            # The first healthy state is taken in any case: progress since a fault must not wait for the interval.
            if self._healthy_steps == 1 or step % self.args.recovery_snapshot_steps == 0:
                self._snapshots.take(self._present(), step)
        self._faults.clear()
        self._batches.clear()
        self.event = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave finite weights behind, whatever has happened since the last step, and free the snapshots' memory."""
        self.check_weights()
        if self.event is not None:
            self._report(self.event)
        self._faults.clear()
        self.event, self._snapshots = None, Snapshots()

    # Faults

    def _settle(self, **measured: float) -> bool:
        """Whether this step has met a fault, on any process. The first time that is so, go back to the good state."""
        faults = ranks.found_by(self._faults, list(FAULTS), self.accelerator)
        if faults and self.event is None:
            self._recover(faults, measured)
        return bool(faults)

    def _recover(self, faults: dict[str, list[int]], measured: dict[str, float]) -> None:
        """Keep what is broken for inspection, go back to the good state and go on more carefully."""
        step, what = self.state.global_step + 1, _described(faults)
        if self._snapshots.good is None:
            raise Diverged(step, what, "There is no good state to go back to: start from other weights")
        self.attempts.set(self.attempts.count + 1)  # before anything else that may fail
        self.event = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "faults": faults,
            "attempt": self.attempts.count,
            **{name: value if math.isfinite(value) else str(value) for name, value in measured.items()},
        }
        debug = self._save_special("debug", {"event": self.event, "batches": self._batches, **self._texts()})
        self.on_fault(step)
        if self._reference_copy is not None and self.reference is not None and not finite(self.reference.parameters()):
            _load_tensors(dict(self.reference.named_parameters()), self._reference_copy)
        back_to = None
        if faults.keys() - WITHOUT_ROLLBACK:
            self.learning_rate_cut.cut(self.optimizer, self.scheduler)
            self._restore()
            back_to = self._snapshots.step
        self.event |= {
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
                f"step {event['step']} skipped: {_described(event['faults'])}. {back}, attempt {event['attempt']} of "
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
        """What training changes in the policy: parameters with gradients, and floating-point buffers."""
        model = self.accelerator.unwrap_model(self.policy)
        tensors = {name: each for name, each in model.named_parameters() if each.requires_grad}
        return tensors | {name: each for name, each in model.named_buffers() if each.is_floating_point()}

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
        _load_tensors(self._trained(), good["weights"])
        load_optimizer(self.optimizer, good["optimizer"])
        for name, control in self.controls.items():
            control.load_state_dict(copy_tree(good["controls"][name]))
        self._snapshots.drop()

    def keep_reference(self) -> None:
        """Copy the reference's weights, which nothing but `sync_ref_model` changes."""
        if self.reference is not None:
            self._reference_copy = copy_tree(dict(self.reference.named_parameters()), self._reference_copy)


def no_rewards(guard: Guard | None, step: int) -> None:
    """No completion of a batch, on any process, has a finite reward: a fault, or without a guard the end of the run."""
    if guard is None:
        raise Diverged(step, f"{FAULTS['rewards']} not finite", remedy(["rewards"]))
    guard._faults.add("rewards")
