"""Checks of the trainer's arguments: contradictions are refused before anything is loaded, with the remedy.

What is wrong with one field by itself stands in the table `FIELD_CHECKS`; what is wrong with several together in
functions.
"""

import math
import os
from collections.abc import Callable, Iterator
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
from rookworld_trl.training.refusal import Clash, refuse, require
from rookworld_trl.training.schedules import LR_CONTROLS, LR_SCHEDULES
from rookworld_trl.training.validation_sampling import (
    ROLLOUT_BACKENDS,
    SCORED,
    check_objective,
    check_sampling,
    check_task_sampling,
    mining,
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
    strategies = [str(getattr(each, "value", each)) for each in (config.eval_strategy, config.save_strategy)]
    refuse(
        config,
        (
            name,
            config.metric_for_best_model is None,
            "nothing says which checkpoint is the best. Set `metric_for_best_model`",
        ),
        (
            name,
            strategies != ["steps", "steps"] or config.eval_steps != config.save_steps,
            "the best checkpoint is known only where each one is measured. Set `eval_strategy` and `save_strategy` to "
            "steps, and `eval_steps` and `save_steps` to the same number",
        ),
        (
            "save_total_limit",
            config.save_total_limit == 1,
            f"with `{name}` the best checkpoint is kept beside the newest, which a run goes on from. Set it to 2 or "
            "more, or leave it out",
        ),
    )


def check_groups(config: GRPOConfig) -> None:
    """That the completions of a batch make whole groups; before TRL's own check, which names no remedy.

    Raises:
        ValueError: they do not.
    """
    rows = config.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    total = config.generation_batch_size or rows * (config.steps_per_generation or config.gradient_accumulation_steps)
    problem = (
        f"it does not divide the {total} completions sampled at a time (processes x per_device_train_batch_size x "
        "steps_per_generation, or generation_batch_size), so a group would be cut in two. Choose a divisor of "
        f"{total}, or make `per_device_train_batch_size` a multiple of {config.num_generations}"
    )
    refuse(config, ("num_generations", total % config.num_generations != 0, problem))


def check(config: GRPOConfig) -> None:
    """Fields against each other.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """
    check_sampling(config)
    check_task_sampling(config)
    for clashes in (mining, adapters, precision, kl, advantages):
        refuse(config, *clashes(config))
    dtype = dict(config.model_init_kwargs or {}).get("dtype", torch.float32)
    require(
        dtype in (torch.float32, "float32"),
        "model_init_kwargs.dtype",
        dtype,
        "updates at these learning rates are smaller than a 16-bit weight can hold, so nothing would be learned",
        "remove it or set it to float32, and choose `bf16` for speed",
    )
    check_objective(config)
    check_monitoring(config)
    problem = (
        "`auto_resume` starts from the newest checkpoint and this from a stable one. Give `recovery_mode` once, and "
        "`auto_resume` when starting again after that"
    )
    refuse(config, ("recovery_mode", config.recovery_mode and config.auto_resume, problem))


def adapters(c: GRPOConfig) -> Iterator[Clash]:
    yield (
        "rollout_backend",
        c.use_peft and c.rollout_backend == "native",
        "native rollouts decode the model's own weights, not adapters beside them. Set it to auto or transformers, or "
        "`use_peft` to False",
    )
    for name in ("reference_reset_steps", "reference_reset_stall"):
        problem = "with `use_peft` the reference is the frozen base, which cannot be replaced"
        yield name, c.use_peft and getattr(c, name), f"{problem}. Set it to 0, or `use_peft` to False"


def precision(c: GRPOConfig) -> Iterator[Clash]:
    name = "epsilon" if c.epsilon_high is None else "epsilon_high"
    yield (
        name,
        c.loss_type == "cispo" and getattr(c, name) < 1,
        "the loss cispo weights every token by its ratio, cut at `epsilon_high`: below 1 all of them are cut. Set it "
        "to 5, say",
    )


def kl(c: GRPOConfig) -> Iterator[Clash]:
    needs_reference = {
        "kl_control": c.kl_control != "fixed",
        "lr_control": c.lr_control != "fixed",
        "kl_stop_threshold": bool(c.kl_stop_threshold),
        "kl_warmup_steps": c.kl_warmup_steps > 0,
        "reference_reset_steps": c.reference_reset_steps > 0,
        "reference_reset_stall": c.reference_reset_stall > 0,
    }
    nothing = "with `beta` 0 there is no reference model and no KL to act on. Set `beta` above 0, or leave this off"
    for name, wanted in needs_reference.items():
        yield name, wanted and c.beta == 0, nothing
    controlled = c.kl_control != "fixed"
    yield (
        "beta",
        controlled and not 0 < c.beta_min <= c.beta <= c.beta_max,
        f"a controlled beta must start within [beta_min, beta_max] = [{c.beta_min:g}, {c.beta_max:g}]. Widen the "
        "bounds or move beta",
    )
    yield (
        "sync_ref_model",
        controlled and c.sync_ref_model,
        "a reference that follows the policy by itself defeats the KL control. Use `reference_reset_steps` or a fixed "
        "beta",
    )
    yield (
        "reference_reset_stall",
        c.reference_reset_stall == 1,
        "standing still takes two steps at least. Set it to something like 50",
    )


def advantages(c: GRPOConfig) -> Iterator[Clash]:
    yield (
        "multi_objective_aggregation",
        (c.use_gae or c.advantage_baseline != "group_mean") and c.multi_objective_aggregation != "sum_then_normalize",
        "only TRL's group mean can normalise each reward by itself. Set it to sum_then_normalize, or "
        "`advantage_baseline` to group_mean and `use_gae` to False",
    )
    # Where a group agrees its deviation is 0, and its distance to a running mean is not.
    yield (
        "advantage_baseline",
        c.advantage_baseline in ("ema", "adaptive") and c.scale_rewards == "group",
        "`scale_rewards` is group, and a group's own deviation is no measure of its distance to a running mean. Set "
        "`scale_rewards` to batch or none, or `advantage_baseline` to group_mean or leave_one_out",
    )
    sequence = c.importance_sampling_level == "sequence" or c.loss_type in ("luspo", "vespo")
    yield (
        "use_gae",
        c.use_gae and (sequence or c.off_policy_mask_threshold is not None),
        "GAE gives each token its own advantage, and sequence-level importance sampling, the losses luspo and vespo, "
        "and `off_policy_mask_threshold` take one for the whole completion. Set `use_gae` to False, or use token-level "
        "importance sampling with another loss and no such mask",
    )
    yield (
        "use_gae",
        c.use_gae and (c.advantage_baseline != "group_mean" or c.scale_rewards == "group"),
        "the value head is the baseline, token by token; groups play no part. Leave `advantage_baseline` at group_mean "
        "and set `scale_rewards` to batch or none",
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
