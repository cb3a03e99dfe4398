"""How large a micro-batch fits the memory of a GPU, measured by the passes that take most of it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging
from trl import GRPOConfig

from rookworld_trl.memory import HEAD_ROWS, SHARE
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.settings.parser import option, require
from rookworld_trl.training.placement import on_gpu
from rookworld_trl.training.plugin import Plugin

logger = logging.get_logger(__name__)


def fit_batch(config: GRPOConfig, measure: Callable[[int], float], budget: float) -> None:
    """Set the micro-batch to the largest that fits; completions per optimizer step and per generation stay as they are.

    Memory grows linearly with the rows: two measurements give the line, a third proves the choice.

    Args:
        config: `per_device_train_batch_size`, `gradient_accumulation_steps` and `steps_per_generation` are changed.
        measure: rows -> bytes that a micro-batch of them takes at its worst, all else included; infinite: too many.
        budget: bytes of the device that may be taken.

    Raises:
        ValueError: not even one row fits.
    """
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    generated = config.per_device_train_batch_size * config.steps_per_generation
    sizes = [size for size in range(1, rows + 1) if rows % size == 0 and generated % size == 0]
    one, two = measure(1), measure(2)
    slope = max(two - one, 1.0)
    fitting = [size for size in sizes if (one if size == 1 else one + (size - 1) * slope) <= budget]
    while len(fitting) > 1 and measure(fitting[-1]) > budget:
        fitting.pop()
    # Devices may differ, and what else is on them: all processes take the smallest, or raise.
    size = min(gather_object([fitting[-1] if fitting else 0]))
    require(
        size > 0,
        "auto_batch_size",
        True,
        f"on one device not even one row fits (here it takes {one / 1e9:.1f} GB of the {budget / 1e9:.1f} allowed)",
        "set `activation_checkpointing` to true, or take a larger device",
    )
    config.per_device_train_batch_size = size
    config.gradient_accumulation_steps, config.steps_per_generation = rows // size, generated // size
    logger.warning(f"micro-batches of {size} rows, {rows // size} for each update: what fits {budget / 1e9:.1f} GB")


def worst_pass(
    model: Any, rows: int, length: int, keep: int, dtype: torch.dtype | None = None, checkpointing: bool = False
) -> None:
    """Forward and backward of rows that are as long as can be, the head's logits in pieces as in training.

    Gradients are there from the start, as those of earlier micro-batches are, and are gone at the end.

    Args:
        length: tokens of a row.
        keep: its completion's, the last ones.
        dtype: autocast's, None without.
        checkpointing: with `activation_checkpointing`.
    """
    device, training = next(model.parameters()).device, model.training
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    head = model.get_output_embeddings()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):  # as `GPT2.logits`
            return torch.log_softmax(head(hidden.float()), dim=-1).sum()

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -keep - 1 : -1]
            pieces = hidden.flatten(0, 1).split(HEAD_ROWS)
            total = torch.stack([checkpoint(loss, piece, use_reentrant=False) for piece in pieces]).sum()
        total.backward()
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
            model.train(training)
        model.zero_grad(set_to_none=True)


def peak_memory(step: Callable[[], object], model: nn.Module) -> float:
    """Bytes that are in use at most while `step` runs, with AdamW's moments and the reference; infinite: too many."""
    model.to("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        torch.cuda.empty_cache()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return float(torch.cuda.max_memory_allocated() + 3 * weights)


def check_sampling_memory(rows: int, taken: float, budget: float) -> None:
    """Raises:
    ValueError: sampling so many completions takes more bytes than there are for it.
    """
    taken = max(gather_object([taken]))
    require(
        taken <= budget,
        "auto_batch_size",
        True,
        f"sampling {rows} completions at a time takes {taken / 1e9:.1f} GB, the share of this device is "
        f"{budget / 1e9:.1f}",
        "lower `per_device_train_batch_size` x `gradient_accumulation_steps`, or take a larger device",
    )


def _sample(model: Any, prompt: list[int], rows: int, keep: int, dtype: torch.dtype | None) -> None:
    with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        rollout(model, [prompt], num_samples=rows, max_new_tokens=keep, eos_token_id=None)


@dataclass
class MicroBatch(Plugin):
    """`fit_batch` for the run at hand. TRL refuses transformers' `auto_find_batch_size`, which would cut groups.

    Raises:
        ValueError: the model is only named, its prompts are streamed, or not even one row fits.
    """

    NAME = "auto_batch_size"

    auto_batch_size: bool = option(
        False, "On a GPU, measure memory and choose the micro-batch; the batch of an update stays as it is."
    )
    memory_share: float = option(SHARE, "Share of the GPU that auto_batch_size may fill.", above=0, most=1)

    @property
    def on(self) -> bool:
        return self.auto_batch_size

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        if not on_gpu(args):
            yield (
                "auto_batch_size: memory is measured on a CUDA GPU only. Set it to false and "
                "`per_device_train_batch_size` by hand"
            )
        if args.objective != "sampled":
            yield f"auto_batch_size: `objective` is {args.objective}, and branches are not measured. Set it to False"

    def adjust(self, args: Any, model: Any, dataset: Any, tokenizer: Any) -> None:
        require(
            isinstance(model, nn.Module) and isinstance(dataset, Dataset),
            "auto_batch_size",
            True,
            "it measures a model that is loaded on a data set with a length",
            "give the trainer both as objects, or set `per_device_train_batch_size` by hand",
        )
        prompts = tokenizer(list(dataset["prompt"]))["input_ids"]
        longest, keep = max(prompts, key=len), int(args.max_completion_length or 0)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        budget = memory * self.memory_share
        shape = (len(longest) + keep, keep, dtype, bool(args.activation_checkpointing))
        fit_batch(args, lambda rows: peak_memory(lambda: worst_pass(model, rows, *shape), model), budget)
        if model.config.model_type == "gpt2" and not args.use_vllm:
            # Sampling takes all rows of a generation batch at once, whatever the micro-batch, and no activations.
            rows = args.per_device_train_batch_size * args.steps_per_generation
            taken = peak_memory(lambda: _sample(model, longest, rows, keep, dtype), model)
            check_sampling_memory(rows, taken, budget)
