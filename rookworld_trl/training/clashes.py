"""Contradictions of the trainer's arguments, refused before anything is loaded.

Each generator yields lines of one form, "field: what is wrong with it. What to do". What is wrong with one field by
itself stands in the table of `rookworld_trl.training.validation`.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import GRPOConfig

from rookworld_trl.training.placement import cuda_graphs, on_gpu
from rookworld_trl.training.refusal import refuse, require

# `generation_kwargs` reach `generate` behind the loss's back; only those that cannot change what is sampled may pass.
_HARMLESS_GENERATION_KWARGS = {"use_cache", "cache_implementation", "prefill_chunk_size"}

SCORED = "the loss scores tokens under the untruncated distribution, so this one would be scored wrongly"
_WITHOUT_TRUNCATION: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

_DEVICE = re.compile(r"cpu|cuda:\d+")


def check(config: GRPOConfig) -> None:
    """Fields against each other, once TRL has filled in its own.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """
    extra = set(config.generation_kwargs or {}) - _HARMLESS_GENERATION_KWARGS
    require(not extra, "generation_kwargs", sorted(extra), SCORED, "remove these keys")
    refuse(config, sampling(config))
    check_task_sampling(config)
    for clashes in (mining, adapters, kl, advantages):
        refuse(config, clashes(config))
    dtype = dict(config.model_init_kwargs or {}).get("dtype", torch.float32)
    problem = "updates at these learning rates are smaller than a 16-bit weight can hold, so nothing would be learned"
    remedy = "remove it or set it to float32, and choose `bf16` for speed"
    require(dtype in (torch.float32, "float32"), "model_init_kwargs.dtype", dtype, problem, remedy)
    if config.objective != "sampled":
        refuse(config, objective(config))
    check_monitoring(config)
    refuse(config, restarts(config))


def check_devices(config: GRPOConfig) -> None:
    """Fields about devices, among each other and with what is computed; once all others are settled.

    Raises:
        ValueError: as in `check`.
    """
    refuse(config, devices(config))


def check_batches(config: GRPOConfig) -> None:
    """Whole groups, the best checkpoint, the loader; before TRL's and transformers' own checks, which name no remedy or
    leave cases open.

    Raises:
        ValueError: as in `check`.
    """
    refuse(config, groups(config))
    refuse(config, best(config))
    problem = "batches are lists of Python rows, which have no memory to pin"
    require(not config.dataloader_pin_memory, "dataloader_pin_memory", True, problem, "leave it out")


def groups(c: GRPOConfig) -> Iterator[str]:
    rows = c.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    total = c.generation_batch_size or rows * (c.steps_per_generation or c.gradient_accumulation_steps)
    if total % c.num_generations:
        yield (
            f"num_generations: it does not divide the {total} completions sampled at a time (processes x "
            "per_device_train_batch_size x steps_per_generation, or generation_batch_size), so a group would be cut in "
            f"two. Choose a divisor of {total}, or make `per_device_train_batch_size` a multiple of {c.num_generations}"
        )


def best(c: GRPOConfig) -> Iterator[str]:
    name = "load_best_model_at_end" if c.load_best_model_at_end else "metric_for_best_model"
    if not getattr(c, name):
        return
    if c.metric_for_best_model is None:
        yield f"{name}: nothing says which checkpoint is the best. Set `metric_for_best_model`"
    strategies = [str(getattr(each, "value", each)) for each in (c.eval_strategy, c.save_strategy)]
    if strategies != ["steps", "steps"] or c.eval_steps != c.save_steps:
        yield (
            f"{name}: the best checkpoint is known only where each one is measured. Set `eval_strategy` and "
            "`save_strategy` to steps, and `eval_steps` and `save_steps` to the same number; or leave out "
            "`load_best_model_at_end` (false) and `metric_for_best_model` (null) both"
        )
    if c.save_total_limit == 1:
        yield (
            f"save_total_limit: with `{name}` the best checkpoint is kept beside the newest, which a run goes on from. "
            "Set it to 2 or more, or leave it out"
        )


def sampling(c: GRPOConfig) -> Iterator[str]:
    """Who samples."""
    vllm, batching = c.use_vllm, c.use_transformers_continuous_batching
    own = not vllm and not batching and c.rollout_backend != "transformers"
    if vllm and batching:
        yield "use_transformers_continuous_batching: vLLM would sample, and this do nothing. Leave it or `use_vllm` out"
    if (vllm or batching) and c.rollout_backend not in ("auto", "vllm" if vllm else "transformers"):
        yield (
            "rollout_backend: `use_vllm` and `use_transformers_continuous_batching` choose the sampler too. Unset "
            "them, or leave `rollout_backend` out"
        )
    if vllm and c.vllm_mode == "colocate" and not (c.bf16 or c.fp16):
        yield (
            "vllm_mode: TRL starts that engine in the dtype of vLLM's choice, bfloat16, and the loss would be scored "
            "in float32. Set `bf16` to true, or use a server (`vllm_mode: server`) started with `--dtype float32`"
        )
    if c.full_determinism and own and on_gpu(c):
        yield (
            "full_determinism: this package's own decoding adds up probabilities, which CUDA has no deterministic "
            "kernel for. Set `rollout_backend` to transformers, or leave it out: the seed decides the samples in any "
            "case"
        )


def check_task_sampling(config: GRPOConfig) -> None:
    by_task = config.task_sampling or {}
    mapping = isinstance(by_task, dict) and all(isinstance(own, dict) for own in by_task.values())
    remedy = "write it as {environment: {temperature: 0.7}}"
    require(mapping, "task_sampling", by_task, "settings stand by task", remedy)
    if by_task and (config.use_vllm or config.use_transformers_continuous_batching):
        problem = "vLLM and continuous batching take one setting for all rows"
        remedy = "unset `use_vllm` and `use_transformers_continuous_batching`, or leave it out"
        require(False, "task_sampling", by_task, problem, remedy)
    for task, own in dict(by_task).items():
        for name, value in own.items():
            field = f"task_sampling[{task}].{name}"
            if name == "temperature":
                positive = isinstance(value, int | float) and value > 0
                require(positive, field, value, "sampling needs a positive temperature", "set it to something like 1.0")
            elif name == "max_completion_length":
                limit = config.max_completion_length or 0
                fits = isinstance(value, int) and 1 <= value <= limit
                require(fits, field, value, "it lies outside 1 to `max_completion_length`", f"use at most {limit}")
            elif name in _WITHOUT_TRUNCATION:
                # Renormalising over what a truncated sampler kept would make the loss exact for the sampling policy
                # only: after an update, tokens that were sampled may lie outside the new policy's cut, at ratio 0.
                require(value == _WITHOUT_TRUNCATION[name], field, value, SCORED, "leave it out")
            else:
                require(False, field, value, "no such setting", "use temperature or max_completion_length")


def mining(c: GRPOConfig) -> Iterator[str]:
    if c.mining and c.use_gae:
        yield (
            "mining: with `use_gae` the value head is the baseline, and a group whose rewards agree still teaches. Set "
            "one of them to False"
        )
    if c.mining and c.advantage_baseline in ("ema", "adaptive"):
        yield (
            "mining: with `advantage_baseline` ema or adaptive a group whose rewards agree teaches too, and dropping "
            "it is a bias. Leave `advantage_baseline` at group_mean or leave_one_out, or set `mining` to False"
        )
    if c.mining and (c.use_vllm or c.use_transformers_continuous_batching):
        yield (
            "mining: it samples parts of a batch, which vLLM and continuous batching here do not. Unset `use_vllm` and "
            "`use_transformers_continuous_batching`, or set `mining` to False"
        )


def adapters(c: GRPOConfig) -> Iterator[str]:
    if c.use_peft and c.rollout_backend == "native":
        yield (
            "rollout_backend: native rollouts decode the model's own weights, not adapters beside them. Set it to auto "
            "or transformers, or `use_peft` to False"
        )
    for name in ("reference_reset_steps", "reference_reset_stall"):
        if c.use_peft and getattr(c, name):
            yield (
                f"{name}: with `use_peft` the reference is the frozen base, which cannot be replaced. Set it to 0, or "
                "`use_peft` to False"
            )


def kl(c: GRPOConfig) -> Iterator[str]:
    controlled = c.kl_control != "fixed"
    needs_reference = {
        "kl_control": controlled,
        "lr_control": c.lr_control != "fixed",
        "kl_stop_threshold": c.kl_stop_threshold,
        "kl_warmup_steps": c.kl_warmup_steps,
        "reference_reset_steps": c.reference_reset_steps,
        "reference_reset_stall": c.reference_reset_stall,
    }
    nothing = "with `beta` 0 there is no reference model and no KL to act on. Set `beta` above 0, or leave this off"
    yield from (f"{name}: {nothing}" for name, wanted in needs_reference.items() if wanted and c.beta == 0)
    if controlled and not 0 < c.beta_min <= c.beta <= c.beta_max:
        yield (
            f"beta: a controlled beta must start within [beta_min, beta_max] = [{c.beta_min:g}, {c.beta_max:g}]. Widen "
            "the bounds or move beta"
        )
    if controlled and c.sync_ref_model:
        yield (
            "sync_ref_model: a reference that follows the policy by itself defeats the KL control. Use "
            "`reference_reset_steps` or a fixed beta"
        )
    if c.reference_reset_stall == 1:
        yield "reference_reset_stall: standing still takes two steps at least. Set it to something like 50"


def advantages(c: GRPOConfig) -> Iterator[str]:
    own = c.use_gae or c.advantage_baseline != "group_mean"
    if own and c.multi_objective_aggregation != "sum_then_normalize":
        yield (
            "multi_objective_aggregation: only TRL's group mean can normalise each reward by itself. Set it to "
            "sum_then_normalize, or `advantage_baseline` to group_mean and `use_gae` to False"
        )
    # Where a group agrees its deviation is 0, and its distance to a running mean is not.
    if c.advantage_baseline in ("ema", "adaptive") and c.scale_rewards == "group":
        yield (
            "advantage_baseline: `scale_rewards` is group, and a group's own deviation is no measure of its distance "
            "to a running mean. Set `scale_rewards` to batch or none, or `advantage_baseline` to group_mean or "
            "leave_one_out"
        )
    sequence = c.importance_sampling_level == "sequence"
    if c.use_gae and (sequence or c.off_policy_mask_threshold is not None):
        yield (
            "use_gae: GAE gives each token its own advantage, and sequence-level importance sampling and "
            "`off_policy_mask_threshold` take one for the whole completion. Set `use_gae` to False, or use token-level "
            "importance sampling and no such mask"
        )
    if c.use_gae and (c.advantage_baseline != "group_mean" or c.scale_rewards == "group"):
        yield (
            "use_gae: the value head is the baseline, token by token; groups play no part. Leave `advantage_baseline` "
            "at group_mean and set `scale_rewards` to batch or none"
        )


def objective(c: GRPOConfig) -> Iterator[str]:
    """What the exact gradient leaves no room for."""
    compared = "the points of a completion say what each alternative earns, so nothing is compared"
    off_policy = "a batch that is used more than once has prefixes of an older policy"
    rows, asked = c.per_device_train_batch_size * c.gradient_accumulation_steps, c.steps_per_generation
    no_room = {
        "mining": (c.mining, "no group can teach nothing, so none has to give way. Set it to False"),
        "use_gae": (c.use_gae, f"{compared}. Set it to False"),
        "advantage_baseline": (c.advantage_baseline != "group_mean", f"{compared}. Leave it at group_mean"),
        "num_iterations": (c.num_iterations > 1, f"{off_policy}. Set it to 1"),
        "steps_per_generation": (
            asked != c.gradient_accumulation_steps,
            f"{off_policy}. Leave it at `gradient_accumulation_steps`",
        ),
        "scale_rewards": (
            c.scale_rewards == "batch",
            "each decision point has a deviation of its own, in closed form. Set it to group or none",
        ),
        "top_entropy_quantile": (
            c.top_entropy_quantile < 1,
            "a decision is summed over whole actions, not token by token. Set it to 1.0; `entropy_coef` works",
        ),
        "kl_estimator": (c.kl_estimator == "exact", "it needs a forward pass without branches. Use k3, say"),
        "auto_batch_size": (c.auto_batch_size, "it does not measure branches. Set it to False"),
        "num_generations": (
            c.objective == "mixed" and rows % c.num_generations,
            f"a process's {rows} completions a step are no whole number of groups. Choose a divisor of {rows}",
        ),
    }
    yield from (f"{name}: `objective` is {c.objective}, and {why}" for name, (found, why) in no_room.items() if found)


def restarts(c: GRPOConfig) -> Iterator[str]:
    if c.recovery_mode and c.auto_resume:
        yield (
            "recovery_mode: `auto_resume` starts from the newest checkpoint and this from a stable one. Give "
            "`recovery_mode` once, and `auto_resume` when starting again after that"
        )


def devices(c: GRPOConfig) -> Iterator[str]:
    # CUDA graphs give their memory to the next call, and with it the gradients that are being summed up. Nor are
    # shapes fixed: on a GPU TRL's head takes the valid tokens of a batch only. So torch's default mode stands.
    if cuda_graphs(c) and c.gradient_accumulation_steps > 1:
        yield (
            "torch_compile_mode: its CUDA graphs overwrite gradients that are accumulated "
            f"(`gradient_accumulation_steps` is {c.gradient_accumulation_steps}). Leave it out, or set it to "
            "max-autotune-no-cudagraphs"
        )
    elsewhere = c.ref_device != "auto"
    if elsewhere and not _DEVICE.fullmatch(c.ref_device):
        yield "ref_device: no such device. Write auto, cpu, or cuda: and a number, such as cuda:1"
    beside = {"beta": c.beta == 0, "kl_estimator": c.kl_estimator == "exact", "sync_ref_model": c.sync_ref_model}
    for name, found in beside.items():
        if elsewhere and found:
            yield (
                f"ref_device: with `{name}` {getattr(c, name)} there is no reference, or it must sit beside the "
                f"policy. Leave `ref_device` at auto, or change `{name}`"
            )
    if c.ref_device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "ref_device: every process would put its reference there. Write auto or cpu where several processes train"
    if c.tf32 and not c.bf16 and not c.fp16:
        yield (
            "tf32: the gates hold float32 log-probs to 1e-4, and TF32 keeps three digits. Set `bf16` to true as well, "
            "or leave `tf32` out"
        )
    if c.auto_batch_size and not on_gpu(c):
        yield (
            "auto_batch_size: memory is measured on a CUDA GPU only. Set it to false and `per_device_train_batch_size` "
            "by hand"
        )


def check_monitoring(config: GRPOConfig) -> None:
    bands = config.health_bands if isinstance(config.health_bands, dict) else {}
    for name, band in bands.items():
        pair = isinstance(band, list | tuple) and len(band) == 2 and all(isinstance(x, int | float) for x in band)
        fits = band is None or (pair and band[0] != band[1])
        problem, remedy = "a band is a pair of two different numbers", "write [yellow, red], or null for no band"
        require(fits, f"health_bands[{name}]", band, problem, remedy)
    there = get_available_reporting_integrations() if config.report_to else []
    remedy = f"install it, or choose one of {', '.join(['none', *there])}"
    for tracker in config.report_to:
        require(tracker in there, "report_to", tracker, "no such tracker is installed", remedy)
