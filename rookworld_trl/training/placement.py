"""What the launcher and the fields ask of devices, and where the frozen reference sits.

One process may see several GPUs. transformers would then wrap the policy in `nn.DataParallel`, which copies it at every
forward pass; here the policy keeps one device and a second one takes the reference, so that neither pays for the other.
"""

import os
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, parse_flag_from_env
from trl import GRPOConfig

from rookworld_trl.memory import keep_freed_memory
from rookworld_trl.settings.parser import require

LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # set by every kind of `accelerate launch`


def reference_device(wanted: str, home: torch.device, processes: int, gpus: int, fixed: bool) -> torch.device | None:
    """The device of the reference; None: beside the policy, as TRL puts it.

    Args:
        wanted: `ref_device`. `auto` takes the next GPU if this process has two to itself.
        home: the policy's device.
        processes: how many train.
        gpus: how many this process sees.
        fixed: the reference must stay beside the policy, which it is synchronised with.

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


def arrange(config: GRPOConfig, accelerator: Any, reference: Any, sharded: bool) -> torch.device | None:
    """Move the reference to where `ref_device` says.

    Args:
        reference: None with adapters or without KL.
        sharded: both models are in shards, by DeepSpeed or FSDP.

    Returns:
        The reference's device; None: beside the policy.
    """
    home = accelerator.device
    if home.type == "cpu":
        keep_freed_memory()
    keep_float32(config, accelerator)
    if config.torch_compile and config.activation_checkpointing:
        # Numbers in the code become constants: with `dynamic` they are inputs, which dynamo (PyTorch 2.13) cannot hand
        # into a second checkpointed block; it stops at GELU's `math.pi` with an AssertionError.
        torch._dynamo.config.specialize_float = True
    if sharded or reference is None:
        require(
            config.ref_device == "auto",
            "ref_device",
            config.ref_device,
            "there is no reference (`beta` is 0), or it is part of the policy (adapters) or sharded (DeepSpeed, FSDP)",
            "leave it at auto",
        )
        return None
    gpus, processes = torch.cuda.device_count(), accelerator.num_processes
    device = reference_device(config.ref_device, home, processes, gpus, config.sync_ref_model)
    if device is not None:
        reference.to(device)
    return device


def follow_launcher(config: Any) -> None:
    """Settle whether to use the CPU, in what precision to compute, and whether, by what backend and in which mode to
    compile: by the fields that are set, else by what `accelerate launch` was told (`use_cpu`, `mixed_precision` and
    `dynamo_config` of its file, which reach a program through the environment).

    Its `dynamic`, `fullgraph` and regional compilation have no field here, and hold wherever something is compiled.

    Raises:
        ValueError: a GPU was asked for and there is none.
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # which transformers asks too, for the device alone
        config.use_cpu = True
    precision = os.environ.get(LAUNCHED_PRECISION)
    missing = None if precision is None or config.use_cpu else missing_gpu()
    require(
        missing is None,
        "use_cpu",
        config.use_cpu,
        f"`accelerate launch` was to train on a GPU, and {missing}",
        "give `--use_cpu true` to train on the CPU",
    )
    if config.bf16 is None and not config.fp16 and precision == "bf16":
        config.bf16 = True
    if not config.bf16 and precision == "fp16":
        config.fp16 = True
    if precision and config.bf16 is False and not config.fp16:  # accelerate takes its word where no other is named
        os.environ[LAUNCHED_PRECISION] = "no"
    launched = TorchDynamoPlugin()
    on = launched.backend != DynamoBackend.NO
    backend = config.torch_compile_backend or (launched.backend.value.lower() if on else None)
    mode = config.torch_compile_mode or (launched.mode if on else None)
    if config.torch_compile is None or backend == "no":
        config.torch_compile = backend != "no" and bool(backend or mode)
    # transformers takes either of these for a wish to compile.
    config.torch_compile_backend, config.torch_compile_mode = (backend, mode) if config.torch_compile else (None, None)


def missing_gpu() -> str | None:
    """What may be why torch sees no GPU; None where it sees one."""
    if torch.accelerator.is_available():
        return None
    build = f"this PyTorch ({torch.__version__}, CUDA {torch.version.cuda})"
    return f"{build} sees none: a build without CUDA, an old driver or CUDA_VISIBLE_DEVICES may hide it (docs/gpus.md)"


def agree_on_tf32(config: Any) -> None:
    """Say by torch's old switch of TF32, for all of float32, what the new one says, for a GPU's products.

    transformers sets the new one alone, and whatever reads the old one then, as max-autotune does, stops with a
    RuntimeError about a mix of both. torch sets both where it is asked by the old name.
    """
    said = torch.backends.cuda.matmul.fp32_precision == "tf32" if config.tf32 is None else config.tf32
    torch.set_float32_matmul_precision("high" if said else "highest")


def insist_on_no_compile(config: Any) -> None:
    """With `torch_compile` False, keep accelerate from what its launcher was told. After transformers' checks."""
    if not config.torch_compile and TorchDynamoPlugin().backend != DynamoBackend.NO:
        config.torch_compile_backend = "no"


def cuda_graphs(config: GRPOConfig) -> bool:
    """Whether what is compiled is recorded as CUDA graphs."""
    return config.torch_compile and config.torch_compile_mode in ("reduce-overhead", "max-autotune")


def keep_float32(config: Any, accelerator: Any) -> None:
    """Take back TF32, which accelerate and transformers turn on where a float32 run is compiled: the gates would see
    its three digits."""
    if config.torch_compile and accelerator.mixed_precision == "no" and not config.tf32:
        torch.set_float32_matmul_precision("highest")  # by both of torch's switches


def on_gpu(config: Any) -> bool:
    return torch.cuda.is_available() and not config.use_cpu
