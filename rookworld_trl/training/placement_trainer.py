"""The trainer's devices: a reference that may sit elsewhere, the attention kernel, and what compiling cost."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rookworld_trl.training import placement
from rookworld_trl.training.kl_trainer import KLTrainer


class PlacementTrainer(KLTrainer):
    """Puts the frozen reference where `args.ref_device` says; its inputs go there and its log-probs come back.

    Attributes:
        ref_device: of the reference; None: beside the policy.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.accelerator.device.type == "cpu":
            placement.keep_freed_memory()
        for model in (self.model, self.ref_model):
            # Unwrapped: the `config` of DeepSpeed's engine is its own.
            plain = None if model is None else self.accelerator.unwrap_model(model)
            if plain is not None and self.args.attn_implementation != plain.config._attn_implementation:
                placement.set_attention(plain, self.args.attn_implementation)
        self.ref_device = self._place_reference()
        if self.args.torch_compile:
            self.add_callback(placement.CompileCounter(lambda name, value: self._metrics["train"][name].append(value)))

    def _place_reference(self) -> torch.device | None:
        home, sharded = self.accelerator.device, self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.args.ref_device != "auto" and (sharded or self.ref_model is None):
            raise ValueError(
                f"`ref_device` is {self.args.ref_device!r}: with adapters, DeepSpeed or FSDP the reference is part of "
                "the policy or sharded like it. Leave `ref_device` at auto"
            )
        if sharded or self.ref_model is None:
            return None
        fixed = self.args.kl_estimator == "exact" or self.args.sync_ref_model
        processes, gpus = self.accelerator.num_processes, torch.cuda.device_count()
        device = placement.reference_device(self.args.ref_device, home, processes, gpus, fixed)
        if device is not None:
            self.ref_model.to(device)
        return device

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model is not self.ref_model or self.ref_device is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        home, device = self.accelerator.device, self.ref_device
        args, kwargs = placement.moved((args, kwargs), device)
        temperatures = placement.moved(self._row_temperatures, device)
        precision = placement.precision_of(home, device, self.accelerator.mixed_precision)
        # Triton launches on the current device, whichever its arguments are on.
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self._scoring_at(temperatures), precision, current:
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return placement.moved(result, home)
