"""Checks of what is sampled, by whom and from which prompts; part of `validation`."""

from typing import Any

import torch
from trl import GRPOConfig

from rookworld_trl.training.refusal import require

ROLLOUT_BACKENDS = ("auto", "native", "transformers", "vllm")

# `generation_kwargs` reach `generate` behind the loss's back; only those that cannot change what is sampled may pass.
_HARMLESS_GENERATION_KWARGS = {"use_cache", "cache_implementation", "prefill_chunk_size"}

SCORED = "the loss scores tokens under the untruncated distribution, so this one would be scored wrongly"
_WITHOUT_TRUNCATION: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_sampling(config: GRPOConfig) -> None:
    extra = set(config.generation_kwargs or {}) - _HARMLESS_GENERATION_KWARGS
    require(not extra, "generation_kwargs", sorted(extra), SCORED, "remove these keys")
    other = config.use_vllm or config.use_transformers_continuous_batching
    require(
        not (config.use_vllm and config.use_transformers_continuous_batching),
        "use_transformers_continuous_batching",
        True,
        "vLLM would sample, and this do nothing",
        "leave it or `use_vllm` out",
    )
    chosen = {"auto"} | ({"vllm"} if config.use_vllm else {"transformers"})
    require(
        not other or config.rollout_backend in chosen,
        "rollout_backend",
        config.rollout_backend,
        "`use_vllm` and `use_transformers_continuous_batching` choose the sampler too",
        "unset them, or leave `rollout_backend` out",
    )
    require(
        not (config.use_vllm and config.vllm_mode == "colocate") or config.bf16 or config.fp16,
        "vllm_mode",
        "colocate",
        "TRL starts that engine in the dtype of vLLM's choice, bfloat16, and the loss would be scored in float32",
        "set `bf16` to true, or use a server (`vllm_mode: server`) started with `--dtype float32`",
    )
    require(
        not (config.full_determinism and not other and config.rollout_backend != "transformers" and not config.use_cpu)
        or not torch.cuda.is_available(),
        "full_determinism",
        True,
        "this package's own decoding adds up probabilities, which CUDA has no deterministic kernel for",
        "set `rollout_backend` to transformers, or leave it out: the seed decides the samples in any case",
    )
    require(
        not (config.rollout_cuda_graphs and (other or config.rollout_backend == "transformers")),
        "rollout_cuda_graphs",
        True,
        "only this package's own decoding has a step to record",
        "unset it, or set `rollout_backend` to native",
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


def check_mining(config: GRPOConfig) -> None:
    require(
        not (config.mining and config.use_gae),
        "mining",
        True,
        "with `use_gae` the value head is the baseline, and a group whose rewards agree still teaches",
        "set one of them to False",
    )
    require(
        not (config.mining and config.advantage_baseline in ("ema", "adaptive")),
        "mining",
        True,
        "with `advantage_baseline` ema or adaptive a group whose rewards agree teaches too, and dropping it is a bias",
        "leave `advantage_baseline` at group_mean or leave_one_out, or set `mining` to False",
    )
    require(
        not (config.mining and (config.use_vllm or config.use_transformers_continuous_batching)),
        "mining",
        True,
        "it samples parts of a batch, which vLLM and continuous batching here do not",
        "unset `use_vllm` and `use_transformers_continuous_batching`, or set `mining` to False",
    )


def check_objective(config: GRPOConfig) -> None:
    """What the exact gradient leaves no room for."""
    if config.objective == "sampled":
        return
    no_advantages = "the points of a completion say what each alternative earns, so nothing is compared"
    off_policy = "a batch that is used more than once has prefixes of an older policy"
    conflicts = {
        "mining": (config.mining, "no group can teach nothing, so none has to give way", "set it to False"),
        "use_gae": (config.use_gae, no_advantages, "set it to False"),
        "advantage_baseline": (config.advantage_baseline != "group_mean", no_advantages, "leave it at group_mean"),
        "num_iterations": (config.num_iterations > 1, off_policy, "set it to 1"),
        "steps_per_generation": (
            config.steps_per_generation != config.gradient_accumulation_steps,
            off_policy,
            "leave it at `gradient_accumulation_steps`",
        ),
        "scale_rewards": (
            config.scale_rewards == "batch",
            "each decision point has a deviation of its own, in closed form",
            "set it to group or none",
        ),
        "kl_estimator": (config.kl_estimator == "exact", "it needs a forward pass without branches", "use k3, say"),
        "auto_batch_size": (config.auto_batch_size, "it does not measure branches", "set it to False"),
        "torch_compile": (config.torch_compile, "the forward pass is watched by hooks", "set it to False"),
    }
    for name, (found, problem, remedy) in conflicts.items():
        why = f"`objective` is {config.objective}, and {problem}"
        require(not found, name, getattr(config, name), why, remedy)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    require(
        config.objective == "exact" or rows % config.num_generations == 0,
        "num_generations",
        config.num_generations,
        f"`objective` is mixed, and a process's {rows} completions a step are no whole number of groups",
        f"choose a divisor of {rows}",
    )
