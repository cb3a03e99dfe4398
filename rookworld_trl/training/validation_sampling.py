"""Checks of what is sampled, by whom and from which prompts; part of `validation`."""

from collections.abc import Iterator
from typing import Any

import torch
from trl import GRPOConfig

from rookworld_trl.training.refusal import Clash, refuse, require

ROLLOUT_BACKENDS = ("auto", "native", "transformers", "vllm")

# `generation_kwargs` reach `generate` behind the loss's back; only those that cannot change what is sampled may pass.
_HARMLESS_GENERATION_KWARGS = {"use_cache", "cache_implementation", "prefill_chunk_size"}

SCORED = "the loss scores tokens under the untruncated distribution, so this one would be scored wrongly"
_WITHOUT_TRUNCATION: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_sampling(config: GRPOConfig) -> None:
    extra = set(config.generation_kwargs or {}) - _HARMLESS_GENERATION_KWARGS
    require(not extra, "generation_kwargs", sorted(extra), SCORED, "remove these keys")
    vllm, batching = config.use_vllm, config.use_transformers_continuous_batching
    chosen = {"auto"} | ({"vllm"} if vllm else {"transformers"})
    own = not vllm and not batching and config.rollout_backend != "transformers"
    refuse(
        config,
        (
            "use_transformers_continuous_batching",
            vllm and batching,
            "vLLM would sample, and this do nothing. Leave it or `use_vllm` out",
        ),
        (
            "rollout_backend",
            (vllm or batching) and config.rollout_backend not in chosen,
            "`use_vllm` and `use_transformers_continuous_batching` choose the sampler too. Unset them, or leave "
            "`rollout_backend` out",
        ),
        (
            "vllm_mode",
            vllm and config.vllm_mode == "colocate" and not (config.bf16 or config.fp16),
            "TRL starts that engine in the dtype of vLLM's choice, bfloat16, and the loss would be scored in float32. "
            "Set `bf16` to true, or use a server (`vllm_mode: server`) started with `--dtype float32`",
        ),
        (
            "full_determinism",
            config.full_determinism and own and not config.use_cpu and torch.cuda.is_available(),
            "this package's own decoding adds up probabilities, which CUDA has no deterministic kernel for. Set "
            "`rollout_backend` to transformers, or leave it out: the seed decides the samples in any case",
        ),
        (
            "rollout_cuda_graphs",
            config.rollout_cuda_graphs and not own,
            "only this package's own decoding has a step to record. Unset it, or set `rollout_backend` to native",
        ),
    )


def check_task_sampling(config: GRPOConfig) -> None:
    by_task = config.task_sampling or {}
    require(
        isinstance(by_task, dict) and all(isinstance(own, dict) for own in by_task.values()),
        "task_sampling",
        by_task,
        "settings stand by task",
        "write it as {environment: {temperature: 0.7}}",
    )
    require(
        not by_task or not (config.use_vllm or config.use_transformers_continuous_batching),
        "task_sampling",
        by_task,
        "vLLM and continuous batching take one setting for all rows",
        "unset `use_vllm` and `use_transformers_continuous_batching`, or leave it out",
    )
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


def mining(c: GRPOConfig) -> Iterator[Clash]:
    yield (
        "mining",
        c.mining and c.use_gae,
        "with `use_gae` the value head is the baseline, and a group whose rewards agree still teaches. Set one of them "
        "to False",
    )
    yield (
        "mining",
        c.mining and c.advantage_baseline in ("ema", "adaptive"),
        "with `advantage_baseline` ema or adaptive a group whose rewards agree teaches too, and dropping it is a bias. "
        "Leave `advantage_baseline` at group_mean or leave_one_out, or set `mining` to False",
    )
    yield (
        "mining",
        c.mining and (c.use_vllm or c.use_transformers_continuous_batching),
        "it samples parts of a batch, which vLLM and continuous batching here do not. Unset `use_vllm` and "
        "`use_transformers_continuous_batching`, or set `mining` to False",
    )


def check_objective(config: GRPOConfig) -> None:
    """What the exact gradient leaves no room for."""
    if config.objective == "sampled":
        return
    c, why = config, f"`objective` is {config.objective}, and"
    no_advantages = f"{why} the points of a completion say what each alternative earns, so nothing is compared"
    off_policy = f"{why} a batch that is used more than once has prefixes of an older policy"
    one_use = c.steps_per_generation == c.gradient_accumulation_steps
    own_scale = f"{why} each decision point has a deviation of its own, in closed form. Set it to group or none"
    rows = c.per_device_train_batch_size * c.gradient_accumulation_steps
    refuse(
        config,
        ("mining", c.mining, f"{why} no group can teach nothing, so none has to give way. Set it to False"),
        ("use_gae", c.use_gae, f"{no_advantages}. Set it to False"),
        ("advantage_baseline", c.advantage_baseline != "group_mean", f"{no_advantages}. Leave it at group_mean"),
        ("num_iterations", c.num_iterations > 1, f"{off_policy}. Set it to 1"),
        ("steps_per_generation", not one_use, f"{off_policy}. Leave it at `gradient_accumulation_steps`"),
        ("scale_rewards", c.scale_rewards == "batch", own_scale),
        ("kl_estimator", c.kl_estimator == "exact", f"{why} it needs a forward pass without branches. Use k3, say"),
        ("auto_batch_size", c.auto_batch_size, f"{why} it does not measure branches. Set it to False"),
        ("torch_compile", c.torch_compile, f"{why} the forward pass is watched by hooks. Set it to False"),
        (
            "num_generations",
            c.objective == "mixed" and rows % c.num_generations,
            f"{why} a process's {rows} completions a step are no whole number of groups. Choose a divisor of {rows}",
        ),
    )
