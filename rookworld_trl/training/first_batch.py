"""The gates on the first batch of a run: this package's trainer's, or any `GRPOTrainer`'s of TRL by `GateCallback`.

trainer = GRPOTrainer(...)
trainer.add_callback(GateCallback(trainer))
trainer.train()  # raises GateError before the first update if the loss does not score what was sampled
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.modeling.hooks import replaced
from rookworld_trl.training import gates
from rookworld_trl.training.gates import Batch, Bounds, GateResult, Score, enforce
from rookworld_trl.training.recording import Drawn, Sampled, record_generate

logger = logging.get_logger(__name__)

_RECORDED_ROWS = 64


class FirstBatch:
    """Holds the gates until a batch has passed them.

    Args:
        args: the configuration, TRL's `GRPOConfig` or one made from it.
        accelerator: its processes decide alike, so that none waits for another that raised.
        model: the policy.
        score: as in `rookworld_trl.training.gates`.

    Attributes:
        pending: no batch has passed yet.
        sampled: the last batch as it was sampled; None where that is out of sight.
    """

    def __init__(self, args: Any, accelerator: Any, model: nn.Module, score: Score):
        self.args, self.accelerator, self.model, self.score = args, accelerator, model, score
        halves = any(each.dtype in (torch.float16, torch.bfloat16) for each in model.parameters())
        self.bounds = Bounds.for_precision(mixed=halves or accelerator.mixed_precision != "no")
        self.pending = True
        self.sampled: Sampled | None = None

    def measure(self, batch: Batch, step: int) -> list[GateResult]:
        """Measure every gate; `enforce` judges. Where there is dropout, the other gates are measured without it.

        Args:
            step: optimizer steps done; at 0 policy and reference agree.
        """
        score, model, bounds, args = self.score, self.model, self.bounds, self.args
        results = [gates.dropout_gate(score, model, batch, bounds)]
        # Only where it matters: a model that `torch.compile` has compiled would be compiled once more.
        (chance,) = ranks.largest([results[0].measured], self.accelerator)
        still: Any = nullcontext() if chance == 0 else gates.evaluating(model)
        with still, torch.no_grad():
            results.append(gates.padding_gate(score, model, batch, args.temperature, bounds))
            logps = gates.loss_logps(score, model, batch, args.per_device_train_batch_size)
            if self.sampled is not None:
                results.append(gates.temperature_gate(score, model, batch, self._temperatures(batch), bounds))
                results.append(gates.truncation_gate(self.sampled) or gates.settings_gate(args))
                results.append(gates.sampled_ids_gate(self.sampled, batch))
        mask = batch["completion_mask"]
        if "ref_per_token_logps" in batch and step == 0:
            results.append(gates.reference_gate(logps, batch["ref_per_token_logps"], mask, bounds))
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # it keeps float32 weights out of sight
            results.append(gates.weights_gate(model, args.learning_rate))
        if self.sampled is not None:
            results.append(gates.sampler_gate(self.sampled, logps, mask, bounds))
        worst = ranks.largest([result.measured for result in results], self.accelerator)
        return [replace(result, measured=value) for result, value in zip(results, worst, strict=True)]

    def _temperatures(self, batch: Batch) -> list[float]:
        """What the sampler divided each row's logits by: seen where it could be, else as the settings ask."""
        drawn = self.sampled.drawn if self.sampled else []
        seen = [each.temperature if each else None for each in drawn]
        asked = (self.args.generation_kwargs or {}).get("temperature", self.args.temperature)
        count = len(batch["prompt_ids"])
        rest = [next((each for each in seen if each is not None), asked)] * count
        if "temperatures" in batch:
            rest = batch["temperatures"].tolist()
        seen += [None] * (count - len(seen))
        return [own if each is None else each for each, own in zip(seen, rest, strict=True)]


class GateCallback(TrainerCallback):
    """The gates for any `GRPOTrainer` of TRL's: `trainer.add_callback(GateCallback(trainer))`.

    TRL has no event between scoring a batch and the loss, so the trainer is handed over; when training begins, its
    `_generate_and_score_completions` is watched for one batch and then left as it was.

    Args:
        trainer: whose first batch is measured.
        strict: raise when a gate fails; otherwise print the table and train on.

    Attributes:
        results: what was measured; empty before the first batch.

    Raises:
        GateError: in `train()`, before the first update.
    """

    def __init__(self, trainer: Any, strict: bool = True):
        self.trainer, self.strict = trainer, strict
        self.results: list[GateResult] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        original = trainer._generate_and_score_completions

        def watched(inputs: Any) -> Any:
            if not trainer.model.training:  # an evaluation before the first step
                return original(inputs)
            trainer._generate_and_score_completions = original
            batch, self.results = _measured(trainer, original, inputs)
            for result in self.results:
                trainer._metrics["train"][f"gates/{result.gate}"].append(result.measured)
            if self.strict:
                enforce(self.results)
            elif trainer.accelerator.is_main_process:
                print(gates.table(self.results), flush=True)
            return batch

        trainer._generate_and_score_completions = watched


def examine(trainer: Any) -> list[GateResult]:
    """Sample and score a first batch of any `GRPOTrainer`, without training, and measure every gate on it.

    For one process that holds the whole model; where weights are sharded use `GateCallback`.
    """
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    return _measured(trainer, trainer._generate_and_score_completions, rows)[1]


def _measured(trainer: Any, generate_and_score: Any, inputs: Any) -> tuple[Any, list[GateResult]]:
    def score(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, keep: int, *_: Any) -> torch.Tensor:
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]

    first = FirstBatch(trainer.args, trainer.accelerator, trainer.model, score)
    with _turns(trainer) as turns:
        batch = generate_and_score(inputs)
    if "pixel_values" in batch:
        logger.warning("the gates score text alone: a batch with images is not measured")
        return batch, []
    if len(turns) == 1 and any(turns[0].drawn):  # tools and rollout functions put completions together themselves
        first.sampled = turns[0]
    return batch, first.measure(batch, trainer.state.global_step)


@contextmanager
def _turns(trainer: Any) -> Iterator[list[Sampled]]:
    """Record each call of the trainer's `_generate_single_turn`."""
    single_turn, turns = trainer._generate_single_turn, list[Sampled]()

    def recorded(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        with record_generate(policy, _RECORDED_ROWS) as drawn_of:
            completion_ids, logps = single_turn(prompt_ids, *args, **kwargs)
        drawn: Sequence[Drawn] = drawn_of(completion_ids) if logps is None else [Drawn(row) for row in logps]
        turns.append(Sampled(prompt_ids, completion_ids, [*drawn, *[None] * (len(completion_ids) - len(drawn))]))
        return completion_ids, logps

    with replaced(trainer, _generate_single_turn=recorded):
        yield turns
