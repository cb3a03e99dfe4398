"""Who samples the completions, at which settings for each task, and from which distribution each was drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.hooks import Drawn, record_generate
from rookworld_trl.modeling.rollout import rollout

logger = logging.get_logger(__name__)

# Columns of a row, each of which may be missing: its task, its one right completion, and the temperature of its samples
# in place of the configuration's.
TASK_COLUMN, TARGET_COLUMN, TEMPERATURE_COLUMN = "task", "target", "temperature"


def task_of(row: Mapping[str, Any]) -> str:
    return str(row.get(TASK_COLUMN, ""))


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


@dataclass(slots=True)
class Samples:
    """What a sampler returned for one batch, in the batch's order: what the gates look at, and what TRL gets.

    Attributes:
        prompt_ids, completion_ids: token ids, unpadded.
        drawn: how each row was drawn; None for rows not recorded.
        logps: log-prob of each completion token where it was sampled; None for a row that the backend has none for.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    drawn: list[Drawn | None]
    logps: list[list[float] | None] = field(default_factory=list)

    @classmethod
    def blank(cls, count: int) -> "Samples":
        return cls([[]] * count, [[]] * count, [None] * count, [None] * count)

    def put(self, rows: Sequence[int], other: "Samples") -> None:
        """Replace these rows by those of `other`."""
        for number, row in enumerate(rows):
            self.prompt_ids[row], self.completion_ids[row] = other.prompt_ids[number], other.completion_ids[number]
            self.logps[row], self.drawn[row] = other.logps[number], other.drawn[number]

    def end_empty(self, eos_token_id: int) -> None:
        """Give completions without tokens, which ended at once, their end token: TRL reads each completion's last."""
        empty = [row for row, ids in enumerate(self.completion_ids) if not ids]
        for row in empty:
            self.completion_ids[row] = [eos_token_id]
            if self.logps[row] is not None:
                self.logps[row] = [math.nan]  # TRL's mark for an unknown one
        if empty:
            count = len(self.completion_ids)
            logger.warning(f"{len(empty)} of {count} completions have no tokens: taken as their end token alone")


class Sampler:
    """Draws completions by this package's GPT-2, by transformers or by vLLM.

    Args:
        args: the configuration.
        accelerator: for the precision that the loss scores in.
        model: the policy, as TRL has prepared it.
        tokenizer: makes the tokens of the right completions that are drafted.
        eos_token_ids: any of them ends a completion.
        generation_config: what the stock backends read their settings from at each call.

    Attributes:
        backend: native, transformers or vllm.

    Raises:
        ValueError: native was asked for where it cannot work.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        model: nn.Module,
        tokenizer: Any,
        eos_token_ids: list[int],
        generation_config: Any,
    ):
        self.args, self.accelerator, self.model, self.tokenizer = args, accelerator, model, tokenizer
        self.eos_token_ids, self.generation_config = eos_token_ids, generation_config
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        try:
            gpt2 = None if ranks.sharded(accelerator) or len(eos_token_ids) > 1 else GPT2.sharing(plain)
        except ValueError:  # no GPT-2, one with adapters, or another variant
            gpt2 = None
        if args.rollout_backend == "native" and gpt2 is None:
            raise ValueError(
                "`rollout_backend` is 'native', which decodes GPT-2 without adapters, unsharded, with one eos token, "
                f"not this {type(plain).__name__} with {len(eos_token_ids)}. Set it to transformers"
            )
        auto = "vllm" if args.use_vllm else "transformers" if gpt2 is None else "native"
        self.backend = auto if args.rollout_backend == "auto" else args.rollout_backend
        self.gpt2 = gpt2 if self.backend == "native" else None
        self._requests: list[Request] = []  # of the rows at hand; none: the defaults

    # What each row asks for

    def request(self, row: dict[str, Any]) -> Request:
        """Settings of a row's task laid over the defaults, and its draft where its completion is known."""
        args = self.args
        task = task_of(row)
        own = dict(args.task_sampling or {}).get(task, {})
        draft = None
        if self.backend == "native" and task == args.target_task:
            draft = self.target_ids(row)
        temperature = float(own.get("temperature", row.get(TEMPERATURE_COLUMN, args.temperature)))
        return Request(temperature, own.get("max_completion_length", args.max_completion_length), draft)

    def target_ids(self, row: dict[str, Any]) -> tuple[int, ...] | None:
        """Token ids of the row's one right completion, its end token included; None where the data has none."""
        target = row.get(TARGET_COLUMN)
        if not target:
            return None
        return (*self.tokenizer(text=target, add_special_tokens=False)["input_ids"], self.eos_token_ids[0])

    def take(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor | None:
        """From now on, sample by what the tasks of these rows ask for.

        Returns:
            The rows' temperatures (B,); None where the configuration gives all tasks one.
        """
        requests: list[Request] = []
        for number, row in enumerate(rows):  # those of one prompt follow each other
            again = number > 0 and row["prompt"] == rows[number - 1]["prompt"]
            requests.append(requests[-1] if again else self.request(row))
        self._requests = requests
        if not self.args.task_sampling and not any(TEMPERATURE_COLUMN in row for row in rows):
            return None
        return torch.tensor([request.temperature for request in requests], device=self.accelerator.device)

    # Sampling

    def sample(self, prompt_ids: list[list[int]], stock: Callable[[list[list[int]]], Any], record: bool) -> Samples:
        """One completion for each prompt; those of a group follow each other.

        Args:
            stock: TRL's own sampling: prompts -> completions, and log-probs or None.
            record: keep what the gates compare with, where the backend has no log-probs.

        Raises:
            ValueError: prompt and completion, in tokens, may exceed the model's positions.
        """
        requests = self._requests
        if len(requests) != len(prompt_ids):
            requests = [Request(self.args.temperature, self.args.max_completion_length)] * len(prompt_ids)
        context = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        sizes = [(len(ids), each.max_completion_length) for ids, each in zip(prompt_ids, requests, strict=True)]
        prompt, completion = max(sizes, key=sum)
        if prompt + completion > context:
            raise ValueError(
                f"`max_completion_length` is {completion}: with the longest prompt of this batch ({prompt} tokens) it "
                f"exceeds the model's context of {context}. Set it to {context - prompt} or less, or drop the longest "
                "prompts"
            )
        # The seed comes from torch's generator, which TRL seeds for each process and checkpoints keep.
        seed = int(torch.randint(2**31 - 1, ())) if self.backend == "native" else 0
        samples = Samples.blank(len(prompt_ids))
        settings: dict[tuple[float, int], list[int]] = {}  # rows that can be sampled together
        for row, request in enumerate(requests):
            settings.setdefault((request.temperature, request.max_completion_length), []).append(row)
        for rows in settings.values():
            prompts, mine = [prompt_ids[row] for row in rows], [requests[row] for row in rows]
            native = self.backend == "native"
            samples.put(
                rows, self._native(prompts, mine, seed) if native else self._stock(prompts, mine[0], stock, record)
            )
        return samples

    def _native(self, prompt_ids: list[list[int]], requests: list[Request], seed: int) -> Samples:
        """Decode with this package's GPT-2, which prefills equal prompts once and numbers their samples through."""
        assert self.gpt2 is not None, "the backend is native"
        with self.accelerator.autocast():  # the precision that the loss scores in
            result = rollout(
                self.gpt2,
                prompt_ids,
                max_new_tokens=requests[0].max_completion_length,
                eos_token_id=self.eos_token_ids[0],
                temperature=requests[0].temperature,
                seed=seed,
                drafts=[request.draft for request in requests],
            )
        drawn: list[Drawn | None] = [Drawn(logps) for logps in result.logps]
        return Samples(prompt_ids, result.completion_ids, drawn, list(result.logps))

    def _stock(self, prompt_ids: list[list[int]], request: Request, stock: Callable[..., Any], record: bool) -> Samples:
        """TRL's own sampling at one request's settings."""
        vllm = self.backend == "vllm"
        # Autocast, the precision that the loss scores in: only the model's own `forward` is wrapped by accelerate, and
        # `generate` of a model with adapters goes past it. vLLM has a dtype of its own.
        precision = nullcontext() if vllm else self.accelerator.autocast()
        recorder: Any = record_generate(self.model) if record and not vllm else nullcontext()
        if self.generation_config:
            self.generation_config.temperature = request.temperature
            self.generation_config.max_new_tokens = request.max_completion_length
        with precision, recorder as drawn_of:
            ids, logps = stock(prompt_ids)
        drawn = drawn_of(ids) if drawn_of else [Drawn(row) for row in logps or []]
        return Samples(prompt_ids, ids, [*drawn, *[None] * (len(ids) - len(drawn))], logps or [None] * len(ids))
