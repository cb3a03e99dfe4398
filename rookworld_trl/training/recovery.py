"""What can be found not finite in a step, what to do about it, and sampling that survives it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rookworld_trl.checkpointing.exits import UNRECOVERABLE
from rookworld_trl.modeling.hooks import hooked

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
