"""Checks of the trainer's arguments: contradictions are refused before anything is loaded, with the remedy.

What is wrong with one field by itself stands in the table `FIELD_CHECKS`; what is wrong with several together in
functions.
"""

import math
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from trl import GRPOConfig

from rookworld_trl.alerts import Alert
from rookworld_trl.training.advantages import BASELINES
from rookworld_trl.training.kl import KL_ESTIMATORS, KL_TYPES
from rookworld_trl.training.kl_control import KL_CONTROLS
from rookworld_trl.training.refusal import require
from rookworld_trl.training.schedules import LR_CONTROLS, LR_SCHEDULES
from rookworld_trl.training.validation_sampling import (
    ROLLOUT_BACKENDS,
    SCORED,
    check_mining,
    check_objective,
    check_sampling,
    check_task_sampling,
)

OBJECTIVES = ("sampled", "exact", "mixed")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")  # of TRL 1.16
_DROPOUT = "with dropout the same tokens under the same weights score differently each time"


class FieldCheck(NamedTuple):
    """What fields must hold, each by itself; a field whose default is None may be None too."""

    fields: str  # names, with spaces between them
    holds: Callable[[Any], bool]
    problem: str
    remedy: str
    choices: tuple[Any, ...] = ()  # where these are all

    def accepts(self, value: Any) -> bool:
        try:
            return bool(self.holds(value))
        except TypeError:  # of no type that compares with numbers
            return False


def _at_least(bound: float) -> Callable[[Any], bool]:
    return lambda value: bound <= value < math.inf  # false for NaN, too


def _above(bound: float) -> Callable[[Any], bool]:
    return lambda value: bound < value < math.inf


def _one_of(names: str, *choices: Any) -> FieldCheck:
    shown = ", ".join(str(choice) for choice in choices if not isinstance(choice, bool))
    return FieldCheck(names, lambda value: value in choices, "no such choice", f"choose one of {shown}", choices)


FIELD_CHECKS = (
    FieldCheck(
        "num_generations", _at_least(2), "a group needs at least two completions to compare", "set it to 2 or more"
    ),
    FieldCheck(
        "max_completion_length",
        _at_least(1),
        "at least one token must be sampled",
        "set it to the longest completion of the task, in tokens",
    ),
    FieldCheck(
        "per_device_train_batch_size gradient_accumulation_steps num_iterations steps_per_generation "
        "generation_batch_size kl_interval health_patience target_every "
        "recovery_snapshot_steps lora_r",
        _at_least(1),
        "it must be a count of at least 1",
        "set it to 1 or more",
    ),
    FieldCheck(
        "mining_rounds target_rows stable_after_steps recovery_max_attempts seed warmup_steps lr_decay_steps "
        "learning_rate weight_decay adam_epsilon beta kl_warmup_steps kl_stop_threshold reference_reset_steps "
        "reference_reset_stall max_grad_norm",
        _at_least(0),
        "it must be a finite number of 0 or more",
        "set it to 0 or more",
    ),
    FieldCheck(
        "temperature num_train_epochs save_steps logging_steps epsilon_high kl_target beta_min beta_max "
        "lora_alpha reward_limit peak_tflops",
        _above(0),
        "it must be a finite number above 0",
        "set it above 0",
    ),
    FieldCheck(
        "max_steps",
        lambda value: value == -1 or value >= 1,
        "it must be a count of at least 1",
        "set it to 1 or more, or leave it out and set `num_train_epochs`",
    ),
    FieldCheck("kl_factor", _above(1), "beta would not move", "set it above 1"),
    FieldCheck(
        "lr_floor mining_ordinary gae_gamma gae_lambda",
        lambda value: 0 <= value <= 1,
        "it is a share",
        "set it between 0 and 1",
    ),
    FieldCheck("memory_share", lambda value: 0 < value <= 1, "it is a share", "set it above 0, to 1 at most"),
    FieldCheck(
        "adam_beta1 adam_beta2",
        lambda value: 0 <= value < 1,
        "the average would never move",
        "set it below 1, to something like 0.9",
    ),
    FieldCheck("epsilon", lambda value: 0 < value < 1, "ratios are clipped to 1 - epsilon", "use something like 0.2"),
    _one_of("objective", *OBJECTIVES),
    _one_of("kl_type", *KL_TYPES),
    _one_of("kl_estimator", *KL_ESTIMATORS),
    _one_of("kl_control", *KL_CONTROLS),
    _one_of("advantage_baseline", *BASELINES),
    _one_of("lr_schedule", *LR_SCHEDULES),
    _one_of("lr_control", *LR_CONTROLS),
    _one_of("rollout_backend", *ROLLOUT_BACKENDS),
    _one_of("attn_implementation", *ATTENTION),
    _one_of("loss_type", *LOSS_TYPES),
    _one_of("scale_rewards", "batch", "group", "none", True, False),
    _one_of("importance_sampling_level", "token", "sequence"),
    _one_of("multi_objective_aggregation", "sum_then_normalize", "normalize_then_sum"),
    _one_of("vllm_mode", "server", "colocate"),
    FieldCheck("top_p repetition_penalty", lambda value: value == 1, SCORED, "set it to 1.0"),
    FieldCheck("top_k min_p", lambda value: value == 0, SCORED, "set it to 0"),
    FieldCheck("disable_dropout", lambda value: value is True, _DROPOUT, "leave it True"),
    FieldCheck(
        "save_only_model",
        lambda value: value is False,
        "a checkpoint without optimizer state cannot be resumed from",
        "leave it False; the trained model is saved by itself at the end",
    ),
    FieldCheck(
        "save_strategy",
        lambda value: str(getattr(value, "value", value)) != "best",
        "a run that is interrupted between two best steps could not go on from where it was",
        "set it to steps; with `metric_for_best_model` the best checkpoint is kept too",
    ),
)


CHOICES = {name: check.choices for check in FIELD_CHECKS if check.choices for name in check.fields.split()}


def check_fields(config: TrainingArguments, of: type[TrainingArguments] | None = None) -> None:
    """Each field by itself, before TRL and transformers, whose checks name no remedy or divide by it.

    Args:
        of: the class whose fields are checked; by default the config's own.

    Raises:
        ValueError: one message naming the field, its value, what is wrong with it and the remedy.
    """
    defaults = {field.name: field.default for field in fields(of or config)}
    for check in FIELD_CHECKS:
        for name in defaults.keys() & check.fields.split():
            value = getattr(config, name)
            unset = value is None and defaults[name] is None
            require(unset or check.accepts(value), name, value, check.problem, check.remedy)


def check_best(config: TrainingArguments) -> None:
    """What keeping the best checkpoint takes; before transformers' own checks, which leave cases open.

    Raises:
        ValueError: no evaluation, or one at steps that are not saved.
    """
    name = "load_best_model_at_end" if config.load_best_model_at_end else "metric_for_best_model"
    if not getattr(config, name):
        return
    value = getattr(config, name)
    require(
        config.metric_for_best_model is not None,
        name,
        value,
        "nothing says which checkpoint is the best",
        "set `metric_for_best_model`",
    )
    strategies = [str(getattr(each, "value", each)) for each in (config.eval_strategy, config.save_strategy)]
    require(
        strategies == ["steps", "steps"] and config.eval_steps == config.save_steps,
        name,
        value,
        "the best checkpoint is known only where each one is measured",
        "set `eval_strategy` and `save_strategy` to steps, and `eval_steps` and `save_steps` to the same number",
    )
    require(
        config.save_total_limit != 1,
        "save_total_limit",
        config.save_total_limit,
        f"with `{name}` the best checkpoint is kept beside the newest, which a run goes on from",
        "set it to 2 or more, or leave it out",
    )


def check_groups(config: GRPOConfig) -> None:
    """That the completions of a batch make whole groups; before TRL's own check, which names no remedy.

    Raises:
        ValueError: they do not.
    """
    rows = config.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    total = config.generation_batch_size or rows * (config.steps_per_generation or config.gradient_accumulation_steps)
    require(
        total % config.num_generations == 0,
        "num_generations",
        config.num_generations,
        f"it does not divide the {total} completions sampled at a time (processes x per_device_train_batch_size x "
        "steps_per_generation, or generation_batch_size), so a group would be cut in two",
        f"choose a divisor of {total}, or make `per_device_train_batch_size` a multiple of {config.num_generations}",
    )


def check(config: GRPOConfig) -> None:
    """Fields against each other.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """
    check_sampling(config)
    check_task_sampling(config)
    check_mining(config)
    check_adapters(config)
    for part in (check_precision, check_kl, check_advantages, check_objective, check_monitoring):
        part(config)
    require(
        not (config.recovery_mode and config.auto_resume),
        "recovery_mode",
        config.recovery_mode,
        "`auto_resume` starts from the newest checkpoint and this from a stable one",
        "give `recovery_mode` once, and `auto_resume` when starting again after that",
    )


def check_adapters(config: GRPOConfig) -> None:
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


def check_precision(config: GRPOConfig) -> None:
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
        config.loss_type != "cispo" or high >= 1,
        "epsilon_high",
        high,
        "the loss cispo weights every token by its ratio, cut at `epsilon_high`: below 1 all of them are cut",
        "set it to 5, say",
    )


def check_kl(config: GRPOConfig) -> None:
    needs_reference = {
        "kl_control": config.kl_control != "fixed",
        "lr_control": config.lr_control != "fixed",
        "kl_stop_threshold": bool(config.kl_stop_threshold),
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
    require(
        config.reference_reset_stall != 1,
        "reference_reset_stall",
        config.reference_reset_stall,
        "standing still takes two steps at least",
        "set it to something like 50",
    )


def check_advantages(config: GRPOConfig) -> None:
    own = config.use_gae or config.advantage_baseline != "group_mean"
    require(
        not (own and config.multi_objective_aggregation != "sum_then_normalize"),
        "multi_objective_aggregation",
        config.multi_objective_aggregation,
        "only TRL's group mean can normalise each reward by itself",
        "set it to sum_then_normalize, or `advantage_baseline` to group_mean and `use_gae` to False",
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


def check_alert(config: Any) -> None:
    """Raises:
    ValueError: `alert` is no command.
    """
    try:
        Alert(config.alert)
    except ValueError as error:
        raise ValueError(
            f"`alert` is {config.alert!r}: {error}. Write a command with its arguments, or an address that begins with "
            "http:// or https://"
        ) from error


def check_monitoring(config: GRPOConfig) -> None:
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
    check_alert(config)
    there = get_available_reporting_integrations() if config.report_to else []
    for tracker in config.report_to:
        require(
            tracker in there,
            "report_to",
            tracker,
            "no such tracker is installed",
            f"install it, or choose one of none{''.join(f', {name}' for name in there)}",
        )
