"""The policy becomes the new reference, at times (ProRL, arXiv 2505.24864)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rookworld_trl.checkpointing.state import Stateful
from rookworld_trl.settings.parser import option
from rookworld_trl.training.config import NO_KL
from rookworld_trl.training.plugin import Plugin, Row

TOLERANCE = 0.05  # of the mean KL of the older half, within which that of the newer one stands still


@dataclass
class ReferenceReset(Plugin):
    """Replaces the reference and, as ProRL does, lets the optimizer forget the old one's pull.

    It has stalled when the mean KL of the newer half of the last `reference_reset_stall` steps is that of the older
    half: the policy has stopped moving away, held by the penalty.
    """

    NAME = "reference_reset_steps"
    STATE = "reference_reset"
    REMEMBERED = ("steps", "history")

    reference_reset_steps: int = option(0, "Make the policy the new reference every so many optimizer steps; 0: never.")
    reference_reset_stall: int = option(0, "Do so when the KL has stood still over so many optimizer steps; 0: never.")
    steps: int = field(default=0, init=False)
    history: list[float] = field(default_factory=list, init=False)

    @property
    def on(self) -> bool:
        return bool(self.reference_reset_steps or self.reference_reset_stall)

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        name = "reference_reset_steps" if self.reference_reset_steps else "reference_reset_stall"
        if args.beta == 0:
            yield f"{name}: {NO_KL}"
        if args.use_peft:
            yield (
                f"{name}: with `use_peft` the reference is the frozen base, which cannot be replaced. Set it to 0, or "
                "`use_peft` to False"
            )
        if self.reference_reset_stall == 1:
            yield "reference_reset_stall: standing still takes two steps at least. Set it to something like 50"

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        if trainer.scorer.reference is None:
            raise ValueError(
                "`reference_reset_steps` and `reference_reset_stall` replace a reference model, but adapters have "
                "none: their reference is the base model. Set both to 0, or train without adapters"
            )

    def undone(self) -> Stateful:
        return self

    def observe(self, kl: float) -> None:
        """Count one optimizer step by its mean KL, which says nothing about a stall if it is NaN or Inf."""
        self.steps += 1
        if math.isfinite(kl):
            self.history = [*self.history, kl][-max(1, self.reference_reset_stall) :]

    @property
    def due(self) -> bool:
        if self.reference_reset_steps and self.steps >= self.reference_reset_steps:
            return True
        window, history = self.reference_reset_stall, self.history
        if not window or len(history) < window:
            return False
        older, newer = sum(history[: window // 2]) / (window // 2), sum(history[-(window // 2) :]) / (window // 2)
        return older > 0 and abs(newer - older) <= TOLERANCE * older

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.step_kl is not None:
            self.observe(self.trainer.step_kl[0])

    def rows(self, rows: list[Row]) -> None:
        """Replace the reference, if that is due, where no completion of an earlier batch is left."""
        if not self.due:
            return
        trainer = self.trainer
        plain = partial(trainer.accelerator.unwrap_model, keep_torch_compile=False)
        plain(trainer.scorer.reference).load_state_dict(plain(trainer.model).state_dict())
        self.steps, self.history = 0, []
        trainer.optimizer.state.clear()
        trainer.reference_replaced = True
        trainer.state.log_history.append({"step": trainer.state.global_step, "reference_reset": True})
        if trainer.guard:
            trainer.guard.keep_reference()
