"""Where the frozen reference sits, how large a micro-batch fits, and what compiling cost.

One process may see several GPUs. transformers would then wrap the policy in `nn.DataParallel`, which copies it at every
forward pass; here the policy keeps one device and a second one takes the reference, so that neither pays for the other.
"""

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rookworld_trl.training.refusal import require

if TYPE_CHECKING:
    from rookworld_trl.training.config import RookWorldGRPOConfig

logger = logging.get_logger(__name__)

COMPILE_BUCKET = 64  # tokens; prompts and completions of compiled models are padded to multiples of it
HEAD_ROWS = 4096  # tokens whose logits are there at once, about what TRL's head and the shared passes take
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_DEVICE = re.compile(r"cpu|cuda:\d+")


def settle(config: "RookWorldGRPOConfig") -> None:
    """Check the fields about devices and fill in what follows from them; for the end of the config's `__post_init__`.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """
    if config.n_gpu > 1:
        config._n_gpu = 1  # read by transformers where it would wrap the policy in DataParallel
    if config.torch_compile and config.pad_to_multiple_of is None:
        config.pad_to_multiple_of = COMPILE_BUCKET
    # CUDA graphs give their memory to the next call, and with it the gradients that are being summed up. Nor are shapes
    # fixed: on a GPU TRL's head takes the valid tokens of a batch only. So torch's default mode stands unless changed.
    graphs = config.torch_compile and config.torch_compile_mode in ("reduce-overhead", "max-autotune")
    require(
        not (graphs and config.gradient_accumulation_steps > 1),
        "torch_compile_mode",
        config.torch_compile_mode,
        "its CUDA graphs overwrite gradients that are accumulated (`gradient_accumulation_steps` is "
        f"{config.gradient_accumulation_steps})",
        "leave it out, or set it to max-autotune-no-cudagraphs",
    )
    elsewhere = config.ref_device != "auto"
    require(
        not elsewhere or _DEVICE.fullmatch(config.ref_device) is not None,
        "ref_device",
        config.ref_device,
        "no such device",
        "write auto, cpu, or cuda: and a number, such as cuda:1",
    )
    for name, clash in (
        ("beta", config.beta == 0),
        ("kl_estimator", config.kl_estimator == "exact"),
        ("sync_ref_model", config.sync_ref_model),
    ):
        require(
            not (elsewhere and clash),
            "ref_device",
            config.ref_device,
            f"with `{name}` {getattr(config, name)} there is no reference, or it must sit beside the policy",
            f"leave `ref_device` at auto, or change `{name}`",
        )
    require(
        not (config.ref_device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1),
        "ref_device",
        config.ref_device,
        "every process would put its reference there",
        "write auto or cpu where several processes train",
    )
    require(
        not (config.tf32 and not config.bf16 and not config.fp16),
        "tf32",
        config.tf32,
        "the gates hold float32 log-probs to 1e-4, and TF32 keeps three digits",
        "set `bf16` to true as well, or leave `tf32` out",
    )
    require(
        not config.auto_batch_size or _on_gpu(config),
        "auto_batch_size",
        config.auto_batch_size,
        "memory is measured on a CUDA GPU only",
        "set it to false and `per_device_train_batch_size` by hand",
    )


def choose_precision(config: "RookWorldGRPOConfig") -> None:
    """Fill in `bf16` and `tf32` where they are left open; for the start of the config's `__post_init__`."""
    # Without emulation, which is slower than float32 and which a V100 or T4 has.
    native = _on_gpu(config) and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.bf16 is None:
        config.bf16 = native and not config.fp16
    if config.tf32 is None and native and config.bf16 and torch.version.hip is None:
        config.tf32 = True  # for the head, which stays float32 under autocast: 11 bits of its inputs, bf16 takes 8


def set_attention(model: Any, name: str) -> None:
    """Give a model another attention.

    Raises:
        ValueError: its kernels are not installed.
    """
    try:
        model.set_attn_implementation(name)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`attn_implementation` is {name!r}: {reason} Install it (flash_attention_2: `pip install flash-attn`) or "
            "leave `attn_implementation` out"
        ) from error


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving large blocks back to the system, on Linux; whether it does.

    A pass takes and frees hundreds of megabytes again and again. Fresh pages cost a CPU a fifth of a step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system or another C library
        return False
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all(mallopt(name, value) for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26)))


def reference_device(wanted: str, home: torch.device, processes: int, gpus: int, fixed: bool) -> torch.device | None:
    """The device of the reference; None: beside the policy, as TRL puts it.

    Args:
        wanted: `ref_device`. `auto` takes the next GPU if this process has two to itself.
        home: the policy's device.
        processes: how many train.
        gpus: how many this process sees.
        fixed: the reference must stay beside the policy (exact KL, a synchronised reference).

    Raises:
        ValueError: there is no such GPU.
    """
    if wanted == "auto":
        spare = home.type == "cuda" and processes == 1 and gpus > 1 and not fixed
        return torch.device("cuda", ((home.index or 0) + 1) % gpus) if spare else None
    device = torch.device(wanted)
    require(
        device.type != "cuda" or (device.index or 0) < gpus,
        "ref_device",
        wanted,
        f"this process sees {gpus} GPU(s)",
        "write auto or cpu, or make the GPU visible (CUDA_VISIBLE_DEVICES)",
    )
    return device


def moved(value: Any, device: torch.device) -> Any:
    """The same arguments or results with every tensor on `device`; tuples, lists and dicts are gone through."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=device.type == "cuda")
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return value


@contextmanager
def precision_of(home: torch.device, device: torch.device, mixed_precision: str) -> Iterator[None]:
    """The run's autocast on another kind of device: what accelerate switched on holds for the policy's kind alone."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and device.type != home.type):
        yield


class CompileCounter(TrainerCallback):
    """Reports how many graphs were compiled so far; padding to buckets keeps the number small, this shows it."""

    def __init__(self, record: Callable[[str, float], None]):
        self.record = record

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        from torch._dynamo.utils import counters  # imported where something is compiled

        self.record("perf/compiled_graphs", counters["stats"]["unique_graphs"])


def fit_batch(config: "RookWorldGRPOConfig", measure: Callable[[int], float], memory: float) -> None:
    """Set the micro-batch to the largest that fits; completions per optimizer step and per generation stay as they are.

    Memory grows linearly with the rows: two measurements give the line, a third proves the choice.

    Args:
        config: `per_device_train_batch_size`, `gradient_accumulation_steps` and `steps_per_generation` are changed.
        measure: rows -> bytes that a micro-batch of them takes at its worst, all else included; infinite: too many.
        memory: bytes of the device.

    Raises:
        ValueError: not even one row fits.
    """
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    generated = config.per_device_train_batch_size * config.steps_per_generation
    sizes = [size for size in range(1, rows + 1) if rows % size == 0 and generated % size == 0]
    budget, one, two = memory * config.memory_share, measure(1), measure(2)
    slope = max(two - one, 1.0)
    fitting = [size for size in sizes if (one if size == 1 else one + (size - 1) * slope) <= budget]
    while len(fitting) > 1 and measure(fitting[-1]) > budget:
        fitting.pop()
    require(
        bool(fitting),
        "auto_batch_size",
        True,
        f"one row takes {one / 1e9:.1f} GB, the share of this device is {budget / 1e9:.1f}",
        "set `activation_checkpointing` to true, or take a larger device",
    )
    size = fitting[-1]
    config.per_device_train_batch_size = size
    config.gradient_accumulation_steps, config.steps_per_generation = rows // size, generated // size
    logger.warning(f"micro-batches of {size} rows, {rows // size} for each update: what fits {budget / 1e9:.1f} GB")


def worst_pass(
    model: Any, rows: int, length: int, keep: int, dtype: torch.dtype | None = None, checkpointing: bool = False
) -> None:
    """Forward and backward of rows that are as long as can be, the head's logits in pieces as in training.

    Args:
        length: tokens of a row.
        keep: of its completion, the last ones.
        dtype: of autocast, None without.
        checkpointing: with `activation_checkpointing`.
    """
    device, training = next(model.parameters()).device, model.training
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    head = model.get_output_embeddings()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(head(hidden).float(), dim=-1).sum()

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
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


def measured_memory(
    model: nn.Module, length: int, keep: int, dtype: torch.dtype | None, checkpointing: bool
) -> Callable[[int], float]:
    """`measure` of `fit_batch` on the current GPU: weights, gradients, AdamW's moments, reference, a `worst_pass`."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def measure(rows: int) -> float:
        model.to("cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            worst_pass(model, rows, length, keep, dtype, checkpointing)
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            torch.cuda.empty_cache()
        # Two moments and the reference come on top of what was measured.
        return float(torch.cuda.max_memory_allocated() + 3 * weights)

    return measure


def fit_to_gpu(config: "RookWorldGRPOConfig", model: Any, dataset: Any, tokenizer: Any) -> None:
    """`fit_batch` for the run at hand, if `auto_batch_size` asks for it.

    Raises:
        ValueError: the model is only named, its prompts are streamed, or not even one row fits.
    """
    if not config.auto_batch_size or not _on_gpu(config):
        return
    known = isinstance(model, nn.Module) and isinstance(dataset, Dataset)
    require(
        known,
        "auto_batch_size",
        True,
        "it measures a model that is loaded on a data set with a length",
        "give the trainer both as objects, or set `per_device_train_batch_size` by hand",
    )
    longest = max(map(len, tokenizer(list(dataset["prompt"]))["input_ids"]))
    keep = int(config.max_completion_length or 0)
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    measure = measured_memory(model, longest + keep, keep, dtype, bool(config.activation_checkpointing))
    fit_batch(config, measure, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _on_gpu(config: "RookWorldGRPOConfig") -> bool:
    return torch.cuda.is_available() and not config.use_cpu
