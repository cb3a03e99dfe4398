"""The trainer's loss: scoring on shared prefixes, and the KL penalty with direction, estimator and control."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from rookworld_trl.training import kl, learning
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.stops import KLStop, StopCallback
from rookworld_trl.training.throughput import SIDES, Throughput


class KLTrainer(GRPOTrainer):
    """`GRPOTrainer` with the KL term of `rookworld_trl.training.kl`; log-probs share prefixes where possible."""

    args: RookWorldGRPOConfig
    beta: float
    throughput: Throughput
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.share_prefixes = learning.can_share(self.model, self.args, self.accelerator)
        self._loss_logps: list[torch.Tensor] | None = None  # collects the loss's own forward pass while it runs
        self._only: tuple[torch.Tensor, torch.Tensor | None] | None = None  # of `learning.score_some`; None: all rows
        self._row_temperatures: torch.Tensor | None = None  # (B,) of the rows being scored; None: all `temperature`
        self._kl_meter = kl.KLMeter()
        self.kl_controller = kl.KLController(**self.args.kl_controller_options())
        self.kl_stop = KLStop(self.args.kl_stop_threshold)
        self.add_callback(StopCallback(self.kl_stop))
        self.reference_reset = kl.ReferenceReset(self.args.reference_reset_steps, self.args.reference_reset_stall)
        self._reference_was_reset = False
        if self.ref_model is None and (self.reference_reset.every or self.reference_reset.stall_window):
            raise ValueError(
                "`reference_reset_steps` and `reference_reset_stall` replace a reference model, but adapters have "
                "none: their reference is the base model. Set both to 0, or train without adapters"
            )

    @property
    def _mode(self) -> str:
        """The key of TRL's metrics: it tells training from evaluation by the model's mode."""
        return "train" if self.model.training else "eval"

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Once TRL has dealt a new generation batch to its micro-batches, bring the rows of each group together."""
        dealt = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.share_prefixes or self._buffered_inputs is dealt or self._buffered_inputs is None:
            return inputs
        self._buffered_inputs = learning.regroup(self._buffered_inputs, self.args)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A new generation batch, before which the reference may be renewed."""
        if self.model.training and self.reference_reset.due:
            self._reset_reference()
        return super()._generate_and_score_completions(inputs)

    @contextmanager
    def _scoring_at(self, temperatures: torch.Tensor | None) -> Iterator[None]:
        """Score the rows of each batch at these temperatures (B,); None: all at `self.temperature`."""
        outer, self._row_temperatures = self._row_temperatures, temperatures
        try:
            yield
        finally:
            self._row_temperatures = outer

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        temperatures = self._row_temperatures
        if self.share_prefixes:
            temperature = self.temperature if temperatures is None else temperatures
            with self.accelerator.autocast():
                if self._only is None:
                    result: Any = learning.score(temperature, model, *args, **kwargs)
                else:
                    result = learning.score_some(*self._only, temperature, model, *args, **kwargs)
        else:
            scaled: Any = nullcontext()
            if temperatures is not None:
                scaled = learning.at_temperatures(self.accelerator.unwrap_model(model), temperatures, self.temperature)
            with scaled:
                result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._loss_logps is not None:
            self._loss_logps.append(result[0])
        return result

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        with self._scoring_at(inputs.get("temperatures")):
            return self._loss_with_kl(model, inputs)

    def _loss_with_kl(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss without its KL term, plus ours at the coefficient in force.

        TRL loads a reference and scores it only while `self.beta` is not 0, and reads `self.beta` again in the loss;
        so it is 0 for the length of this call alone.
        """
        learns = learning.rows_that_learn(inputs, self.args) if self.beta == 0 and self.share_prefixes else None
        if self.model.training:
            self.throughput.trained(inputs if learns is None else {key: inputs[key][learns] for key in SIDES})
        if self.beta == 0:
            self._only = None if learns is None else (learns, inputs.get("old_per_token_logps"))
            try:
                return super()._compute_loss(model, inputs)
            finally:
                self._only = None
        exact = self.args.kl_estimator == "exact"
        beta, self.beta, self._loss_logps = self.beta, 0.0, []
        try:
            capture: Any = kl.capture_hidden(self.model) if exact else nullcontext([])
            with capture as hidden:
                loss = super()._compute_loss(model, inputs)
            logps = self._loss_logps[0]
        finally:
            self.beta, self._loss_logps = beta, None
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if exact:
            keep = inputs["completion_ids"].shape[1]
            per_token_kl = self._exact_kl(hidden[0][:, -keep - 1 : -1], inputs, mask)
        else:
            options = (self.args.kl_type, self.args.kl_estimator, self.args.use_bias_correction_kl)
            per_token_kl = kl.estimate_kl(logps, inputs["ref_per_token_logps"], *options)
        # Of estimates from the sampled token alone: the sum over the vocabulary does not depend on who sampled.
        if self.args.use_bias_correction_kl and "old_per_token_logps" in inputs and not exact:
            per_token_kl = per_token_kl * (logps.detach() - inputs["old_per_token_logps"]).exp()
        self._kl_meter.add(per_token_kl, (logps - inputs["ref_per_token_logps"]), mask)
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:  # `num_items_in_batch` counts the generation batch; an update sees a part of it
            tokens = tokens * accumulation / self.args.steps_per_generation
        penalty = kl.aggregate(per_token_kl, mask, self.loss_type, self.max_completion_length, accumulation, tokens)
        loss = loss + self.kl_controller.coefficient * penalty
        if self.accelerator.sync_gradients:
            self._finish_kl_step()
        return loss

    def _exact_kl(self, hidden: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """KL (B, C) over the whole vocabulary, from the loss's hidden states and one more pass of the reference."""
        with torch.no_grad(), self._reference() as reference:
            ref_hidden = self._hidden_states(reference, inputs)
        if self._row_temperatures is not None:  # both are captured before they are scaled
            factors = (self.temperature / self._row_temperatures)[:, None, None]
            hidden, ref_hidden = hidden * factors, ref_hidden * factors
        return kl.exact_kl(
            hidden,
            self.accelerator.unwrap_model(self.model).get_output_embeddings(),
            ref_hidden,
            self.accelerator.unwrap_model(reference).get_output_embeddings(),
            mask,
            self.args.kl_type,
            self.temperature,
        )

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model; with adapters, the policy while they are switched off."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            policy = self.accelerator.unwrap_model(self.model)
            # As TRL does: an adapter that came with the model has a frozen copy of its start beside it.
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                yield self.model

    def _finish_kl_step(self) -> None:
        """After the last micro-batch: reduce over processes, log, adapt the coefficient, judge the stop."""
        mean, sequences = self._kl_meter.reduce(self.accelerator)
        metrics = self._metrics[self._mode]
        metrics["kl"].append(mean)
        metrics["kl/sequence_mean"].append(sequences.mean().item())
        if not self.model.training:
            return
        metrics["kl/coefficient"].append(self.kl_controller.coefficient)
        metrics["kl/sequence_p95"].append(self.kl_stop.observe(sequences)[1])
        self.kl_controller.update(mean, len(sequences))
        self.reference_reset.observe(mean)

    def _reset_reference(self) -> None:
        """Make the current policy the reference and, as ProRL does, let the optimizer forget the old one's pull."""
        policy, reference = (
            self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in (self.model, self.ref_model)
        )
        reference.load_state_dict(policy.state_dict())
        if self.args.reference_reset_optimizer:
            self.optimizer.state.clear()
        self.reference_reset.done()
        self._reference_was_reset = True
        self.state.log_history.append({"step": self.state.global_step, "reference_reset": True})

    def _hidden_states(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Last hidden states (B, C, H) that predict the completion's tokens."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        keep = batch["completion_ids"].shape[1]
        with kl.capture_hidden(model) as states:
            rows = self.args.per_device_train_batch_size
            super()._get_per_token_logps_and_entropies(model, ids, mask, keep, batch_size=rows)
        return torch.cat(states)[:, -keep - 1 : -1]
