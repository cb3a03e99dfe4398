"""Checks of the trainer's arguments: contradictions are refused before anything is loaded, with the remedy."""

import os
from typing import TYPE_CHECKING

import torch

from rookworld_trl.training.advantages import BASELINES
from rookworld_trl.training.kl import KL_CONTROLS, KL_ESTIMATORS, KL_TYPES
from rookworld_trl.training.refusal import check_choice, require
from rookworld_trl.training.schedules import LR_SCHEDULES
from rookworld_trl.training.validation_sampling import check_mining, check_sampling, check_task_sampling

if TYPE_CHECKING:
    from rookworld_trl.training.config import RookWorldGRPOConfig


def check(config: "RookWorldGRPOConfig") -> None:
    """Every check but that of the batch.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """
    check_sampling(config)
    check_task_sampling(config)
    check_mining(config)
    check_adapters(config)
    for part in (check_precision, check_kl, check_advantages, check_schedule, check_monitoring, check_checkpoints):
        part(config)
    check_recovery(config)


def check_batch(config: "RookWorldGRPOConfig") -> None:
    """Before TRL's own check, which names no remedy."""
    generations = config.num_generations or 0
    require(
        generations >= 2,
        "num_generations",
        config.num_generations,
        "a group needs at least two completions to compare",
        "set it to 2 or more",
    )
    rows = config.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    total = config.generation_batch_size or rows * (config.steps_per_generation or config.gradient_accumulation_steps)
    require(
        total % generations == 0,
        "num_generations",
        generations,
        f"it does not divide the {total} completions sampled at a time (processes x per_device_train_batch_size x "
        "steps_per_generation, or generation_batch_size), so a group would be cut in two",
        f"choose a divisor of {total}, or make `per_device_train_batch_size` a multiple of {generations}",
    )
    require(
        (config.max_completion_length or 0) >= 1,
        "max_completion_length",
        config.max_completion_length,
        "at least one token must be sampled",
        "set it to the longest completion of the task, in tokens",
    )


def check_adapters(config: "RookWorldGRPOConfig") -> None:
    require(config.lora_r >= 1, "lora_r", config.lora_r, "it is a rank", "set it to something like 16")
    require(config.lora_alpha > 0, "lora_alpha", config.lora_alpha, "adapters would do nothing", "set it above 0")
    require(
        config.lora_dropout == 0,
        "lora_dropout",
        config.lora_dropout,
        "with dropout the same tokens under the same weights score differently each time",
        "leave it at 0",
    )
    require(
        not (config.use_peft and config.rollout_backend == "native"),
        "rollout_backend",
        config.rollout_backend,
        "native rollouts decode the model's own weights, not adapters beside them",
        "set it to auto or transformers, or `use_peft` to False",
    )
    for name in ("reference_reset_steps", "reference_reset_stall"):
        require(
            not (config.use_peft and getattr(config, name)),
            name,
            getattr(config, name),
            "with `use_peft` the reference is the frozen base, which cannot be replaced",
            "set it to 0, or `use_peft` to False",
        )


def check_precision(config: "RookWorldGRPOConfig") -> None:
    require(
        config.disable_dropout,
        "disable_dropout",
        config.disable_dropout,
        "with dropout the same tokens under the same weights score differently each time",
        "leave it True",
    )
    dtype = dict(config.model_init_kwargs or {}).get("dtype", torch.float32)
    require(
        dtype in (torch.float32, "float32"),
        "model_init_kwargs.dtype",
        dtype,
        "updates at these learning rates are smaller than a 16-bit weight can hold, so nothing would be learned",
        "remove it or set it to float32, and choose `bf16` for speed",
    )
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    require(
        0 < config.epsilon < 1 and high > 0,
        "epsilon",
        (config.epsilon, config.epsilon_high),
        "the ratio is clipped to [1 - epsilon, 1 + epsilon_high]",
        "use something like 0.2 and 0.28",
    )
    require(
        config.loss_type != "cispo" or high >= 1,
        "epsilon_high",
        high,
        "the loss cispo weights every token by its ratio, cut at `epsilon_high`: below 1 all of them are cut",
        "set it to 5, say",
    )


def check_kl(config: "RookWorldGRPOConfig") -> None:
    require(config.beta >= 0, "beta", config.beta, "a negative KL coefficient rewards drift", "set it to 0 or more")
    check_choice(config, "kl_type", KL_TYPES)
    check_choice(config, "kl_estimator", KL_ESTIMATORS)
    check_choice(config, "kl_control", KL_CONTROLS)
    needs_reference = {
        "kl_control": config.kl_control != "fixed",
        "kl_warmup_steps": config.kl_warmup_steps > 0,
        "reference_reset_steps": config.reference_reset_steps > 0,
        "reference_reset_stall": config.reference_reset_stall > 0,
    }
    for name, wanted in needs_reference.items():
        require(
            not (wanted and config.beta == 0),
            name,
            getattr(config, name),
            "with `beta` 0 there is no reference model and no KL to act on",
            "set `beta` above 0, or leave this off",
        )
    controlled = config.kl_control != "fixed"
    require(
        not controlled or config.kl_target > 0,
        "kl_target",
        config.kl_target,
        "the KL cannot be held at or below 0",
        "set it to something like 0.03 nats a token",
    )
    require(
        not controlled or 0 < config.beta_min <= config.beta <= config.beta_max,
        "beta",
        config.beta,
        f"a controlled beta must start within [beta_min, beta_max] = [{config.beta_min:g}, {config.beta_max:g}]",
        "widen the bounds or move beta",
    )
    require(
        not (controlled and config.sync_ref_model),
        "sync_ref_model",
        config.sync_ref_model,
        "a reference that follows the policy by itself defeats the KL control",
        "use `reference_reset_steps` or a fixed beta",
    )
    require(config.kl_factor > 1, "kl_factor", config.kl_factor, "beta would not move", "set it above 1")
    require(config.kl_interval >= 1, "kl_interval", config.kl_interval, "beta would never move", "set it to 1 or more")
    require(config.kl_horizon > 0, "kl_horizon", config.kl_horizon, "it divides", "set it to something like 10000")
    for name in ("kl_warmup_steps", "kl_stop_threshold", "reference_reset_steps", "reference_reset_stall"):
        value = getattr(config, name)
        require(value >= 0, name, value, "it cannot be negative", "set it to 0 to switch it off")
    require(
        config.reference_reset_stall != 1,
        "reference_reset_stall",
        config.reference_reset_stall,
        "standing still takes two steps at least",
        "set it to something like 50",
    )


def check_advantages(config: "RookWorldGRPOConfig") -> None:
    check_choice(config, "advantage_baseline", BASELINES)
    own = config.use_gae or config.advantage_baseline != "group_mean"
    require(
        not (own and config.multi_objective_aggregation != "sum_then_normalize"),
        "multi_objective_aggregation",
        config.multi_objective_aggregation,
        "only TRL's group mean can normalise each reward by itself",
        "set it to sum_then_normalize, or `advantage_baseline` to group_mean and `use_gae` to False",
    )
    require(
        0 <= config.baseline_decay < 1,
        "baseline_decay",
        config.baseline_decay,
        "the average would never move",
        "set it to something like 0.9",
    )
    # Where a group agrees its deviation is 0, and its distance to a running mean is not.
    require(
        not (config.advantage_baseline in ("ema", "adaptive") and config.scale_rewards == "group"),
        "advantage_baseline",
        config.advantage_baseline,
        "`scale_rewards` is group, and a group's own deviation is no measure of its distance to a running mean",
        "set `scale_rewards` to batch or none, or `advantage_baseline` to group_mean or leave_one_out",
    )
    if not config.use_gae:
        return
    sequence = (
        config.importance_sampling_level == "sequence"
        or config.loss_type in ("luspo", "vespo")
        or config.off_policy_mask_threshold is not None
    )
    require(
        not sequence,
        "use_gae",
        True,
        "GAE gives each token its own advantage, and sequence-level importance sampling, the losses luspo and "
        "vespo, and `off_policy_mask_threshold` take one for the whole completion",
        "set `use_gae` to False, or use token-level importance sampling with another loss and no such mask",
    )
    require(
        config.advantage_baseline == "group_mean" and config.scale_rewards != "group",
        "use_gae",
        True,
        "the value head is the baseline, token by token; groups play no part",
        "leave `advantage_baseline` at group_mean and set `scale_rewards` to batch or none",
    )
    for name in ("gae_gamma", "gae_lambda"):
        value = getattr(config, name)
        require(0 <= value <= 1, name, value, "it is a discount", "set it between 0 and 1")
    for name in ("value_hidden_size", "value_learning_rate", "value_epochs"):
        value = getattr(config, name)
        require(value > 0, name, value, "the value head could not learn", "set it above 0")


def check_schedule(config: "RookWorldGRPOConfig") -> None:
    check_choice(config, "lr_schedule", LR_SCHEDULES)
    require(0 <= config.lr_floor <= 1, "lr_floor", config.lr_floor, "it is a share", "set it between 0 and 1")
    require(
        config.lr_decay_steps >= 0,
        "lr_decay_steps",
        config.lr_decay_steps,
        "it cannot be negative",
        "set it to 0 or more",
    )


def check_checkpoints(config: "RookWorldGRPOConfig") -> None:
    for name in ("stable_total_limit", "debug_total_limit"):
        value = getattr(config, name)
        require(value >= 1, name, value, "the newest one is always kept", "set it to 1 or more")
    value = config.stable_after_steps
    require(value >= 0, "stable_after_steps", value, "it is a count", "set it to 0 to make no checkpoint stable")
    require(
        not config.save_only_model,
        "save_only_model",
        config.save_only_model,
        "a checkpoint without optimizer state cannot be resumed from",
        "leave it False; the trained model is saved by itself at the end",
    )
    require(
        not (config.recovery_mode and config.auto_resume),
        "recovery_mode",
        config.recovery_mode,
        "`auto_resume` starts from the newest checkpoint and this from a stable one",
        "give `recovery_mode` once, and `auto_resume` when starting again after that",
    )


def check_recovery(config: "RookWorldGRPOConfig") -> None:
    factor, limit = config.recovery_lr_factor, config.reward_limit
    require(0 < factor <= 1, "recovery_lr_factor", factor, "it cuts the learning rate", "set it to something like 0.5")
    require(0 < limit < float("inf"), "reward_limit", limit, "larger rewards are cut to it", "set it above all of them")
    least = {"recovery_max_attempts": 0, "recovery_snapshot_steps": 1, "recovery_good_steps": 2}
    for name, bound in least.items():
        value = getattr(config, name)
        require(value >= bound, name, value, f"it is a count of at least {bound}", f"set it to {bound} or more")


def check_monitoring(config: "RookWorldGRPOConfig") -> None:
    bands = config.health_bands if isinstance(config.health_bands, dict) else {}
    for name, band in bands.items():
        pair = isinstance(band, list | tuple) and len(band) == 2 and all(isinstance(x, int | float) for x in band)
        require(
            band is None or (pair and band[0] != band[1]),
            f"health_bands[{name}]",
            band,
            "a band is a pair of two different numbers",
            "write [yellow, red], or null for no band",
        )
    require(config.health_patience >= 1, "health_patience", config.health_patience, "it is a count", "set it to 1")
    require(config.truth_rows >= 0, "truth_rows", config.truth_rows, "it is a count", "set it to 0 for none")
    require(config.truth_every >= 1, "truth_every", config.truth_every, "it is a count", "set it to 1 or more")
    require(
        config.peak_tflops is None or config.peak_tflops > 0,
        "peak_tflops",
        config.peak_tflops,
        "utilisation is a share of it",
        "set the device's peak from its data sheet, or leave it out",
    )
