"""The trainer's sampling: who samples, what the completions were sampled at, and the gates on the first batch."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training import gates
from rookworld_trl.training.kl_trainer import KLTrainer
from rookworld_trl.training.preparation import check_context, choose_rollout_backend


class RolloutTrainer(KLTrainer):
    """Completions from `args.rollout_backend` with their log-probs; training starts only if the gates pass."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollout_backend = choose_rollout_backend(self.args, self.model, self.eos_token_ids)
        self._gates_pending = True
        self._sampled: gates.Sampled | None = None  # the last batch as it was sampled, for the gates

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample one completion for each prompt (TRL has repeated them already) with the chosen backend."""
        check_context(self.model.config, max(map(len, prompt_ids)), self.max_completion_length)
        started = time.perf_counter()
        if self.rollout_backend == "native":
            completion_ids, logps = self._native_rollout(prompt_ids)
            recorded: list[Any] = list(logps)
        else:
            recording = self._gates_pending and self._mode == "train" and not self.use_vllm
            with gates.record_generate(self.model) if recording else nullcontext() as logps_of:
                completion_ids, logps = super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )
            recorded = logps_of(completion_ids, self.temperature) if logps_of else list(logps or [])
        if self._gates_pending:
            recorded += [None] * (len(completion_ids) - len(recorded))
            self._sampled = gates.Sampled(prompt_ids, completion_ids, recorded)
        seconds = time.perf_counter() - started
        self._metrics[self._mode]["rollout/seconds_per_sample"].append(seconds / len(completion_ids))
        return completion_ids, logps

    def _native_rollout(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Decode with this package's GPT-2, which prefills equal prompts once and numbers their samples through.

        The seed comes from torch's generator, which TRL seeds for each process and checkpoints keep.
        """
        with self.accelerator.autocast():  # the precision that the loss scores in
            result = rollout(
                self.accelerator.unwrap_model(self.model_wrapped),
                prompt_ids,
                max_new_tokens=self.max_completion_length,
                eos_token_id=self.eos_token_ids[0],
                temperature=self.temperature,
                seed=int(torch.randint(2**31 - 1, ())),
            )
        return result.completion_ids, result.logps

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A new generation batch; the gates look at the first one."""
        batch = super()._generate_and_score_completions(inputs)
        if self._gates_pending and self.model.training:
            self._check_gates(batch)
            self._gates_pending, self._sampled = False, None
        return batch

    def _check_gates(self, batch: dict[str, Any]) -> None:
        """Measure every gate on the first batch; all processes decide alike, so none waits for another that raised."""

        def score(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
            return self._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]

        bounds = gates.Bounds.for_precision(mixed=self.accelerator.mixed_precision != "no")
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        results = [gates.padding_gate(score, self.model, batch, self.temperature, bounds)]
        with torch.no_grad():
            logps = gates.loss_logps(score, self.model, batch, self.args.per_device_train_batch_size)
        if "ref_per_token_logps" in batch and self.state.global_step == 0:
            results.append(gates.reference_gate(logps, batch["ref_per_token_logps"], mask, bounds))
        if self._sampled is not None and self.rollout_func is None and not self.tools:
            results.append(gates.sampled_ids_gate(self._sampled, batch))
            results.append(gates.sampler_gate(self._sampled, logps, mask, bounds))
        gates.enforce(gates.worst_of_all(results, self.accelerator))
