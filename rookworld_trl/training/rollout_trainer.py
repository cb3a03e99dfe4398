"""The trainer's sampling: who samples, with which settings for each task, and the gates on the first batch."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training import gates
from rookworld_trl.training.placement_trainer import PlacementTrainer
from rookworld_trl.training.preparation import check_context, choose_rollout_backend


@dataclass(frozen=True, slots=True)
class Request:
    """How one row is sampled.

    Attributes:
        max_completion_length: tokens.
        draft: the completion to expect, its end token included; changes the speed, never the sample.
    """

    temperature: float
    max_completion_length: int
    draft: tuple[int, ...] | None = None


class RolloutTrainer(PlacementTrainer):
    """Completions from `args.rollout_backend` with their log-probs; training starts only if the gates pass."""

    generation_config: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollout_backend = choose_rollout_backend(self.args, self.model, self.eos_token_ids)
        if self.args.rollout_cuda_graphs and self.rollout_backend != "native":
            raise ValueError(
                f"`rollout_cuda_graphs` is True: this run samples with {self.rollout_backend}, and only this package's "
                "own decoding has a step to record. Unset it"
            )
        self._requests: list[Request] | None = None  # of the rows being sampled and scored; None: the defaults
        self._gates_pending = True
        self._sampled: gates.Sampled | None = None  # the last batch as it was sampled, for the gates

    def close(self) -> None:
        """End a vLLM engine in this process; left to the interpreter, it ends after the process group that it needs."""
        engine = getattr(getattr(self, "vllm_generation", None), "llm", None)
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()

    # What each row asks for

    def _request(self, row: dict[str, Any]) -> Request:
        """Settings of a row's task laid over the defaults, and its draft where its completion is known."""
        task = str(row.get(self.args.task_column, ""))
        own = dict(self.args.task_sampling or {}).get(task, {})  # type: ignore[arg-type]
        draft = None
        if self.rollout_backend == "native" and self.args.draft_rollouts and task == self.args.truth_task:
            draft = self._truth_ids(row)
        temperature = float(own.get("temperature", self.temperature))
        return Request(temperature, own.get("max_completion_length", self.max_completion_length), draft)

    def _truth_ids(self, row: dict[str, Any]) -> tuple[int, ...] | None:
        """Token ids of the row's one right completion, its end token included; None where the data has none."""
        truth = row.get(self.args.truth_column)
        if not truth:
            return None
        ids = self.processing_class(text=truth, add_special_tokens=False)["input_ids"]
        return (*ids, self.eos_token_ids[0])

    @contextmanager
    def _sampling(self, rows: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Sample and score these rows by what their tasks ask for."""
        requests: list[Request] = []
        for number, row in enumerate(rows):  # those of one prompt follow each other
            again = number > 0 and row["prompt"] == rows[number - 1]["prompt"]
            requests.append(requests[-1] if again else self._request(row))
        outer, self._requests = self._requests, requests
        try:
            with self._scoring_at(self._temperatures()):
                yield
        finally:
            self._requests = outer

    def _temperatures(self) -> torch.Tensor | None:
        """Temperatures (B,) of the present rows; None where the configuration gives all tasks one."""
        if not self.args.task_sampling or self._requests is None:
            return None
        return torch.tensor([request.temperature for request in self._requests], device=self.accelerator.device)

    # Sampling

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample one completion for each prompt (TRL has repeated them already) with the chosen backend."""
        requests = self._requests
        if requests is None or len(requests) != len(prompt_ids):  # a turn after a tool call has fewer rows
            requests = [Request(self.temperature, self.max_completion_length)] * len(prompt_ids)
        sizes = [(len(ids) + each.max_completion_length, each) for ids, each in zip(prompt_ids, requests, strict=True)]
        total, longest = max(sizes, key=lambda size: size[0])
        check_context(self.model.config, total - longest.max_completion_length, longest.max_completion_length)
        started = time.perf_counter()
        # The seed comes from torch's generator, which TRL seeds for each process and checkpoints keep.
        seed = int(torch.randint(2**31 - 1, ())) if self.rollout_backend == "native" else 0
        completion_ids: list[list[int]] = [[]] * len(prompt_ids)
        logps: list[Any] = [None] * len(prompt_ids)
        recorded: list[Any] = [None] * len(prompt_ids)
        for rows in _alike(requests):
            prompts, mine = [prompt_ids[row] for row in rows], [requests[row] for row in rows]
            if self.rollout_backend == "native":
                ids, sampled_logps = self._native_rollout(prompts, mine, seed)
                record: list[Any] = list(sampled_logps)
            else:
                others = (images, multimodal_fields, num_generations, has_tool_images)
                ids, sampled_logps, record = self._stock_rollout(prompts, mine[0], *others)
            for row, row_ids, row_logps, row_record in zip(rows, ids, sampled_logps, record, strict=True):
                completion_ids[row], logps[row], recorded[row] = row_ids, row_logps, row_record
        if self._gates_pending:
            self._sampled = gates.Sampled(prompt_ids, completion_ids, recorded)
        seconds = time.perf_counter() - started
        self._metrics[self._mode]["rollout/seconds_per_sample"].append(seconds / len(completion_ids))
        return completion_ids, None if None in logps else logps

    def _native_rollout(
        self, prompt_ids: list[list[int]], requests: list[Request], seed: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Decode with this package's GPT-2, which prefills equal prompts once and numbers their samples through."""
        with self.accelerator.autocast():  # the precision that the loss scores in
            result = rollout(
                self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False),
                prompt_ids,
                max_new_tokens=requests[0].max_completion_length,
                eos_token_id=self.eos_token_ids[0],
                temperature=requests[0].temperature,
                seed=seed,
                drafts=[request.draft for request in requests],
                cuda_graphs=self.args.rollout_cuda_graphs,
            )
        return result.completion_ids, result.logps

    def _stock_rollout(
        self, prompt_ids: list[list[int]], request: Request, *others: Any
    ) -> tuple[list[list[int]], list[Any], list[Any]]:
        """TRL's own sampling at one request's settings: ids, log-probs (or None), and what the gates recorded."""
        recording = self._gates_pending and self._mode == "train" and not self.use_vllm
        defaults = None
        if self.args.task_sampling:
            defaults, self.generation_config = self.generation_config, copy.deepcopy(self.generation_config)
            self.generation_config.temperature = request.temperature
            self.generation_config.max_new_tokens = request.max_completion_length
        try:
            # Autocast, the precision that the loss scores in: only the model's own `forward` is wrapped by accelerate,
            # and `generate` of a model with adapters goes past it. vLLM has a dtype of its own.
            precision = nullcontext() if self.use_vllm else self.accelerator.autocast()
            recorder = gates.record_generate(self.model) if recording else nullcontext()
            with precision, recorder as logps_of:
                ids, logps = super()._generate_single_turn(prompt_ids, *others)
        finally:
            if defaults is not None:
                self.generation_config = defaults
        recorded = logps_of(ids, request.temperature) if logps_of else list(logps or [])
        return ids, logps or [None] * len(ids), recorded + [None] * (len(ids) - len(recorded))

    # Gates

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A new generation batch, sampled and scored by task; the gates look at the first one."""
        with self._sampling(inputs):
            batch = super()._generate_and_score_completions(inputs)
            temperatures = self._temperatures()
            if self.model.training and self._requests and any(request.draft for request in self._requests):
                batch["drafted"] = [request.draft is not None for request in self._requests]
        if temperatures is not None:
            batch["temperatures"] = temperatures
        if self._gates_pending and self.model.training:
            self._check_gates(batch)
            self._gates_pending, self._sampled = False, None
        return batch

    def _check_gates(self, batch: dict[str, Any]) -> None:
        """Measure every gate on the first batch; all processes decide alike, so none waits for another that raised."""

        def score(
            model: nn.Module,
            ids: torch.Tensor,
            mask: torch.Tensor,
            keep: int,
            temperatures: torch.Tensor | None = None,
        ) -> torch.Tensor:
            with self._scoring_at(temperatures):
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
        results = gates.worst_of_all(results, self.accelerator)
        for result in results:
            self._metrics["train"][f"gates/{result.gate}"].append(result.measured)
        gates.enforce(results)


def _alike(requests: Sequence[Request]) -> list[list[int]]:
    """Rows that can be sampled together: of one temperature and one maximal length."""
    settings: dict[tuple[float, int], list[int]] = {}
    for row, request in enumerate(requests):
        settings.setdefault((request.temperature, request.max_completion_length), []).append(row)
    return list(settings.values())
