"""Checks of the devices that things are computed on; for the end of the config's `__post_init__`."""

import os
import re

from trl import GRPOConfig

from rookworld_trl.training.placement import cuda_graphs, on_gpu
from rookworld_trl.training.refusal import refuse

_DEVICE = re.compile(r"cpu|cuda:\d+")


def check_devices(config: GRPOConfig) -> None:
    """Contradictions of fields about devices, among each other and with what is computed.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """
    elsewhere = config.ref_device != "auto"
    refuse(
        config,
        # CUDA graphs give their memory to the next call, and with it the gradients that are being summed up. Nor are
        # shapes fixed: on a GPU TRL's head takes the valid tokens of a batch only. So torch's default mode stands.
        (
            "torch_compile_mode",
            cuda_graphs(config) and config.gradient_accumulation_steps > 1,
            "its CUDA graphs overwrite gradients that are accumulated (`gradient_accumulation_steps` is "
            f"{config.gradient_accumulation_steps}). Leave it out, or set it to max-autotune-no-cudagraphs",
        ),
        (
            "ref_device",
            elsewhere and not _DEVICE.fullmatch(config.ref_device),
            "no such device. Write auto, cpu, or cuda: and a number, such as cuda:1",
        ),
        *(
            (
                "ref_device",
                elsewhere and clash,
                f"with `{name}` {getattr(config, name)} there is no reference, or it must sit beside the policy. Leave "
                f"`ref_device` at auto, or change `{name}`",
            )
            for name, clash in (
                ("beta", config.beta == 0),
                ("kl_estimator", config.kl_estimator == "exact"),
                ("sync_ref_model", config.sync_ref_model),
            )
        ),
        (
            "ref_device",
            config.ref_device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "every process would put its reference there. Write auto or cpu where several processes train",
        ),
        (
            "tf32",
            config.tf32 and not config.bf16 and not config.fp16,
            "the gates hold float32 log-probs to 1e-4, and TF32 keeps three digits. Set `bf16` to true as well, or "
            "leave `tf32` out",
        ),
        (
            "auto_batch_size",
            config.auto_batch_size and not on_gpu(config),
            "memory is measured on a CUDA GPU only. Set it to false and `per_device_train_batch_size` by hand",
        ),
    )
