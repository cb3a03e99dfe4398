"""What it takes to get over a NaN: states known to be good, a count of attempts that outlives the process, a way out.

Nothing here knows a trainer. The idea is PaLM's (arXiv 2204.02311, section 5.1: go back to before the loss spike and
skip its batches), without the disk: the state to go back to is kept in memory, and data, random numbers and the step
counter go on, so that the same batch isn't met again.
"""

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers.utils import logging

from rookworld_trl.checkpointing.exits import UNRECOVERABLE
from rookworld_trl.checkpointing.resume import scale_learning_rate
from rookworld_trl.files import append_line, write_atomically
from rookworld_trl.modeling.hooks import hooked

logger = logging.get_logger(__name__)

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


class Diverged(RuntimeError):  # noqa: N818 - a verdict on the run, not a mistake
    """A step was not finite once more than `recovery_max_attempts` allows, or there was no state to go back to.

    The model holds the last good weights, if there were any, when this is raised.

    Attributes:
        step: the optimizer step that was skipped.
        debug: folder with the broken state and its batch; None if none could be written.
        exit_code: what a program should exit with.
    """

    exit_code = UNRECOVERABLE

    def __init__(self, step: int, what: str, remedy: str, debug: Path | None = None):
        self.step, self.debug = step, debug
        kept = f" The broken state and its batch are in {debug}." if debug else ""
        super().__init__(f"training diverged at step {step}: {what}.{kept} {remedy}")


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element of any tensor is NaN or Inf; one synchronisation with the device."""
    # The largest absolute value: unlike a sum, it cannot overflow by itself.
    norm = get_total_norm([t.detach() for t in tensors if t.is_floating_point() and t.numel()], norm_type=math.inf)
    return bool(norm.isfinite())


def numbers_finite(state: Any) -> bool:
    """Whether nested dicts and lists of JSON values hold neither NaN nor Inf."""
    if isinstance(state, dict | list | tuple):
        return all(map(numbers_finite, state.values() if isinstance(state, dict) else state))
    return not isinstance(state, float) or math.isfinite(state)


def described(faults: dict[str, list[int]]) -> str:
    """`loss and gradient are not finite (process 1)`, with the processes that found it."""
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
        self._candidate: tuple[Any, int] | None = None
        self._spare: Any = None

    def take(self, state: Any, step: int) -> None:
        """Copy `state` (nested containers of tensors and values) as a candidate, in place of an earlier one."""
        spare = self._spare if self._candidate is None else self._candidate[0]
        self._candidate, self._spare = (copy_tree(state, spare), step), None

    def promote(self) -> None:
        """The candidate, if there is one, is good."""
        if self._candidate is not None:
            self._spare = self.good
            self.good, self.step = self._candidate
            self._candidate = None

    def drop(self) -> None:
        """Forget the candidate."""
        if self._candidate is not None:
            self._spare, self._candidate = self._candidate[0], None


class Attempts:
    """Recoveries since the last stretch of good steps, in a file that no checkpoint holds or restores.

    A count inside a checkpoint would start anew whenever a run dies and resumes, and a run that always dies at the same
    step would go on for ever. What cannot be written is said once and then kept in memory alone: a full disk must not
    end a run that is just being saved.

    Args:
        folder: of the run; None on processes that write nothing.
        fresh: forget what an earlier run in this folder has counted.

    Attributes:
        count: attempts in a row, those of earlier processes included.
        total: all attempts of the run.
    """

    def __init__(self, folder: Path | None, fresh: bool = False):
        self.folder = folder
        self.count = self.total = 0
        if folder is None:
            return
        if fresh:
            with _said_not_raised(folder / ATTEMPTS_FILE):
                (folder / ATTEMPTS_FILE).unlink(missing_ok=True)
            return
        try:
            state = json.loads((folder / ATTEMPTS_FILE).read_text(encoding="utf-8"))
            self.count, self.total = int(state["attempts"]), int(state["total"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            logger.warning(f"{folder / ATTEMPTS_FILE} cannot be read ({error!r}): counting attempts from 0")

    def add(self) -> int:
        """Count one more and return the attempts in a row."""
        self.count, self.total = self.count + 1, self.total + 1
        self._save()
        return self.count

    def reset(self) -> None:
        """The run is healthy again."""
        self.count = 0
        self._save()

    def record(self, event: Mapping[str, Any]) -> None:
        """Append an event to `recovery.jsonl`."""
        if self.folder is None:
            return
        with _said_not_raised(self.folder / EVENTS_FILE):
            append_line(self.folder / EVENTS_FILE, json.dumps(event))

    def _save(self) -> None:
        if self.folder is None:
            return
        with _said_not_raised(self.folder / ATTEMPTS_FILE):
            text = json.dumps({"attempts": self.count, "total": self.total})
            write_atomically(self.folder / ATTEMPTS_FILE, text + "\n")


@contextmanager
def _said_not_raised(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}): make room or fix its permissions; training goes on")


class LearningRateCut:
    """The share of the schedule that is left after recoveries; travels in checkpoints, as the cut schedule does.

    Attributes:
        scale: 1 before the first recovery; each halves it, but at most so many times: faults that have nothing to do
            with the rate must not end up switching learning off.
    """

    def __init__(self, times: int):
        self.floor, self.scale = RATE_AFTER_FAULT**times, 1.0

    def cut(self, optimizer: Any, scheduler: Any) -> None:
        """Lower the rate in force and those the schedule is going to set."""
        lowered = max(self.floor, self.scale * RATE_AFTER_FAULT)
        ratio, self.scale = lowered / self.scale, lowered
        scale_learning_rate(optimizer, scheduler, ratio)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = float(state["scale"])


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` that leaves `state` alone and the learning rates in force."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(copy_tree(state))  # it keeps tensors that are on the right device, so it gets its own
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def load_tensors(target: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy `saved` into the tensors of the same names, in place."""
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(saved[name])


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes in a model: parameters with gradients, and floating-point buffers."""
    tensors = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return tensors | {name: each for name, each in model.named_buffers() if each.is_floating_point()}


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
