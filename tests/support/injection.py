"""Faults placed by process and step, each of its own kind and at its own place in an optimizer step."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_group
from transformers import TrainerCallback

from rookworld_trl.training import RookWorldGRPOTrainer
from tests.support.plugged import plugin_of
from tests.support.toy import make_trainer

NAN, INF = float("nan"), float("inf")


def poison_weight(trainer: Any) -> None:
    trainer.model.transformer.h[0].mlp.c_fc.weight.data[3, 1] = NAN


def poison_unused_weight(trainer: Any) -> None:
    """The embedding of a position that no row reaches: the loss and its gradient stay finite."""
    trainer.model.transformer.wpe.weight.data[-1, 0] = INF


def blow_weights_up(trainer: Any) -> None:
    """Finite themselves, but their logits are not."""
    trainer.model.transformer.wte.weight.data.mul_(1e30)


def poison_moments(trainer: Any) -> None:
    """Only the update made from it is broken."""
    optimizer = trainer.optimizer.optimizer
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"][0] = NAN


def poison_coefficient(trainer: Any) -> None:
    trainer.kl.controller.beta = NAN


def poison_value_head(trainer: Any) -> None:
    plugin_of(trainer, "use_gae").head.net[1].weight.data[0, 0] = NAN


STATE: dict[str, Callable[[Any], None]] = {
    "weight": poison_weight,
    "unused weight": poison_unused_weight,
    "huge weights": blow_weights_up,
    "moments": poison_moments,
    "coefficient": poison_coefficient,
    "value head": poison_value_head,
}


class Injector(TrainerCallback):
    """Brings faults into a training run, and watches it.

    Args:
        plan: (process, step, kind); steps count from 1.

    Attributes:
        hashes: of the weights after each step, by step.
        finite: whether the weights were finite after each step.
        rates: learning rate in force after each step.
    """

    def __init__(self, trainer: RookWorldGRPOTrainer, plan: Sequence[tuple[int, int, str]]):
        self.trainer, self.plan = trainer, list(plan)
        self.armed: set[str] = set()
        self.hashes: dict[int, str] = {}
        self.finite: dict[int, bool] = {}
        self.rates: dict[int, float] = {}
        self._wrap("_compute_loss", self._loss)
        self._wrap("training_step", self._training_step)
        trainer.reward_funcs = [self._reward(function) for function in trainer.reward_funcs]
        trainer.model.transformer.register_forward_hook(self._hidden)
        trainer.add_callback(self)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        original = getattr(self.trainer, name)
        setattr(self.trainer, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def _loss(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        return loss * NAN if "loss" in self.armed else loss

    def _training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        if "gradient" in self.armed:
            next(self.trainer.model.parameters()).grad[0, 0] = INF
        return torch.full_like(loss, INF) if "loss value" in self.armed else loss

    def _hidden(self, module: Any, inputs: Any, output: Any) -> None:
        if "sampling" in self.armed and not torch.is_grad_enabled():
            output.last_hidden_state[0] = NAN

    def _reward(self, original: Any) -> Any:
        def reward(**kwargs: Any) -> list[float | None]:
            if "exception" in self.armed:
                raise ZeroDivisionError("this reward function is broken on purpose")
            values = original(**kwargs)
            return [NAN] * len(values) if "rewards" in self.armed else values

        reward.__name__ = original.__name__
        return reward

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = (self.trainer.accelerator.process_index, state.global_step + 1)
        self.armed = {kind for *place, kind in self.plan if tuple(place) == now}
        for kind in self.armed & STATE.keys():
            STATE[kind](self.trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "late gradient" in self.armed:  # behind every look at it
            next(self.trainer.model.parameters()).grad[0, 0] = NAN

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = list(self.trainer.model.state_dict().values())
        self.hashes[state.global_step] = hash_of(weights)
        self.finite[state.global_step] = all(bool(tensor.isfinite().all()) for tensor in weights)
        self.rates[state.global_step] = self.trainer.optimizer.param_groups[0]["lr"]


def hash_of(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_each(runs: list[tuple[str, list[tuple[int, int, str]], dict[str, Any]]]) -> None:
    """Train the toy task in this process and others, once for each folder, plan of faults and options; write what each
    process saw."""
    for folder, plan, options in runs:
        trainer = make_trainer(Path(folder), per_device_train_batch_size=2, ddp_backend="gloo", **options)
        injector = Injector(trainer, [(rank, step, kind) for rank, step, kind in plan])
        error, started = "", time.monotonic()
        try:
            trainer.train()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        result = {
            "error": error,
            "seconds": time.monotonic() - started,
            "hashes": list(injector.hashes.values()),
            "finite": all(injector.finite.values()),
            "attempts": trainer.guard.attempts,
            "limit": _get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
        }
        Path(folder, f"rank-{trainer.args.process_index}.json").write_text(json.dumps(result), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
