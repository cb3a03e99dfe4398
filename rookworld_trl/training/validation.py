"""What each of the trainer's arguments must hold by itself, with the remedy: the table `FIELD_CHECKS`.

What is wrong with several together is in `rookworld_trl.training.clashes`.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from transformers import TrainingArguments

from rookworld_trl.training.advantages import BASELINES
from rookworld_trl.training.clashes import SCORED
from rookworld_trl.training.loss import LOSS_TYPES
from rookworld_trl.training.refusal import require
from rookworld_trl.training.schedules import LR_CONTROLS, LR_SCHEDULES

KL_TYPES = ("policy_to_reference", "reference_to_policy", "symmetric")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")
KL_CONTROLS = ("fixed", "multiplicative", "proportional")
ROLLOUT_BACKENDS = ("auto", "native", "transformers", "vllm")
OBJECTIVES = ("sampled", "exact", "mixed")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
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
    FieldCheck(
        "kl_type",
        lambda value: value not in ("forward", "reverse"),
        "which of the two directions that is depends on the author",
        "write policy_to_reference, KL(pi || ref) = sum pi log(pi / ref), or reference_to_policy, KL(ref || pi) = "
        "sum ref log(ref / pi)",
    ),
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
