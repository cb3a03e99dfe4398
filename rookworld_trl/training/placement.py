"""Where the frozen reference sits, in which precision things are computed, and what compiling cost.

One process may see several GPUs. transformers would then wrap the policy in `nn.DataParallel`, which copies it at every
forward pass; here the policy keeps one device and a second one takes the reference, so that neither pays for the other.
"""

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.training.refusal import require

if TYPE_CHECKING:
    from rookworld_trl.training.config import RookWorldGRPOConfig

COMPILE_BUCKET = 64  # tokens; prompts and completions of compiled models are padded to multiples of it
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
        not config.auto_batch_size or on_gpu(config),
        "auto_batch_size",
        config.auto_batch_size,
        "memory is measured on a CUDA GPU only",
        "set it to false and `per_device_train_batch_size` by hand",
    )


def choose_precision(config: "RookWorldGRPOConfig") -> None:
    """Fill in `bf16` and `tf32` where they are left open; for the start of the config's `__post_init__`."""
    # Without emulation, which is slower than float32 and which a V100 or T4 has.
    native = on_gpu(config) and torch.cuda.is_bf16_supported(including_emulation=False)
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


def arrange(
    config: "RookWorldGRPOConfig", accelerator: Any, policy: Any, reference: Any, sharded: bool
) -> torch.device | None:
    """Set the attention kernel of both models, and move the reference to where `ref_device` says.

    Args:
        reference: None with adapters or without KL.
        sharded: both are in shards, by DeepSpeed or FSDP.

    Returns:
        The reference's device; None: beside the policy.
    """
    home = accelerator.device
    if home.type == "cpu":
        keep_freed_memory()
    for model in (policy, reference):
        # Unwrapped: the `config` of DeepSpeed's engine is its own.
        plain = None if model is None else accelerator.unwrap_model(model)
        if plain is not None and config.attn_implementation != plain.config._attn_implementation:
            set_attention(plain, config.attn_implementation)
    if sharded or reference is None:
        require(
            config.ref_device == "auto",
            "ref_device",
            config.ref_device,
            "with adapters, DeepSpeed or FSDP the reference is part of the policy or sharded like it",
            "leave it at auto",
        )
        return None
    fixed = config.kl_estimator == "exact" or config.sync_ref_model
    device = reference_device(config.ref_device, home, accelerator.num_processes, torch.cuda.device_count(), fixed)
    if device is not None:
        reference.to(device)
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


def on_gpu(config: "RookWorldGRPOConfig") -> bool:
    return torch.cuda.is_available() and not config.use_cpu
