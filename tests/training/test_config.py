"""Defaults set on purpose; contradictions refused with field, value and remedy."""

import warnings
from dataclasses import fields
from typing import Any

import pytest

from rookworld_trl.settings.parser import parse
from rookworld_trl.training import RookWorldGRPOConfig
from rookworld_trl.training.plugin import check_plugins
from tests.support.documents import shown
from tests.support.plugged import plugged


def test_nothing_warns_of_what_the_user_did_not_set(tmp_path: Any) -> None:
    """transformers warns of the old name `gradient_checkpointing` wherever it has a value, TRL's default included."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = RookWorldGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
        asked = RookWorldGRPOConfig(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing=True)
    assert (config.gradient_checkpointing, config.activation_checkpointing) == (False, False)
    assert (asked.gradient_checkpointing, asked.activation_checkpointing) == (True, True)
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing`"):
        old = RookWorldGRPOConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert old.activation_checkpointing


STOCK, EMA = {"rollout_backend": "transformers"}, {"advantage_baseline": "ema"}
EXACT = {"objective": "exact", "scale_rewards": "none"}
NO_ROOM = [("mining", True), ("use_gae", True), ("advantage_baseline", "leave_one_out"), ("num_iterations", 2)]
NO_ROOM += [("steps_per_generation", 2), ("scale_rewards", "batch"), ("top_entropy_quantile", 0.5)]
SERVED = {"rollout_backend": "vllm", "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_kwargs": {"typical_p": 0.5}}, r"`generation_kwargs` is {'typical_p': 0.5}: .* Keep none but"),
        ({"rollout_backend": "native", "use_vllm": True}, r"`rollout_backend` is 'native': `use_vllm` .* leave "),
        (STOCK | {"use_vllm": True}, r"`rollout_backend` is 'transformers': `use_vllm` .* leave"),
        ({"use_adaptive_entropy": True}, r"`use_adaptive_entropy` is True: .* Set `entropy_coef`"),
        ({"use_transformers_continuous_batching": True}, "batching` is True: .* Leave it"),
        (
            SERVED | {"vllm_mode": "colocate", "bf16": False},
            r"`vllm_mode` is 'colocate': .* Set `bf16` to true, or use",
        ),
        (
            {"kl_type": "backward"},
            r"`kl_type` is 'backward': no such choice. Choose one of policy_to_reference, reference_to_policy, symm",
        ),
        ({"kl_control": "multiplicative", "beta": 0}, r"`kl_control` is 'mult.* no reference .* Set `beta` above"),
        ({"kl_warmup_steps": 5, "beta": 0}, r"`kl_warmup_steps` is 5: with `beta` 0 .* Set `beta` above 0"),
        ({"lr_control": "kl", "beta": 0}, r"`lr_control` is 'kl': with `beta` 0 .* Set `beta` above 0"),
        ({"kl_stop_threshold": 50, "beta": 0}, r"`kl_stop_threshold` is 50: with `beta` 0 .* no KL to act on"),
        ({"kl_control": "multiplicative", "beta": 5.0}, r"`beta` is 5.0: a controlled .* \[0.0001, 1\]\. Widen"),
        ({"kl_control": "multiplicative", "sync_ref_model": True}, r"`sync_ref_model` is True: .* Use a fixed beta"),
        (EMA | {"multi_objective_aggregation": "normalize_then_sum"}, r"`multi_.* Set it to sum_then_normalize"),
        (EMA | {"scale_rewards": "group"}, r"`advantage_baseline` is 'ema': .* Set `scale_rewards`"),
        ({"loss_type": "cispo"}, r"`loss_type` is 'cispo': no such choice. Choose one of dapo, grpo, dr_grpo, bnpo"),
        ({"use_gae": True, "importance_sampling_level": "sequence"}, r"`use_gae` is True: .* one .* Set `use_gae`"),
        ({"use_gae": True, "advantage_baseline": "ema"}, r"`use_gae` is True: .* Leave `advantage_baseline`"),
        ({"use_gae": True, "scale_rewards": "group"}, r"`use_gae` is True: .* set `scale_rewards` to batch or none"),
        ({"task_sampling": {"A": {"temperature": 0}}}, r"`task_sampling\[A\].temperature` is 0: .* Set it to"),
        ({"task_sampling": {"A": {"max_completion_length": 999}}}, r"\[A\].max_completion_length` is 999: .* Use at "),
        (
            {"task_sampling": {"A": {"top_p": 0.9}}},
            r"`task_sampling\[A\].top_p` is 0.9: no such setting. Use temperature",
        ),
        ({"task_sampling": {"temperature": 1.0}}, r"`task_sampling` is {'temp.* settings stand by task. Write it as"),
        ({"mining": True, "use_gae": True}, r"`use_gae` is True: with `mining` .* Set one of them to False"),
        ({"mining": True, "advantage_baseline": "ema"}, r"`advantage_baseline` is 'ema': with `mining` .* Leave"),
        *((EXACT | {field: value}, rf"`{field}` is .*`objective` is exact") for field, value in NO_ROOM),
        ({"ref_device": "gpu"}, "`ref_device` is 'gpu': no such device. Write auto, cpu, or cuda:"),
        ({"ref_device": "cpu", "beta": 0.1, "sync_ref_model": True}, r"follows the policy \(`sync_ref"),
    ],
)
def test_contradictions_are_refused(tmp_path: Any, changes: dict[str, Any], message: str) -> None:
    settings, plugins = plugged(
        {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8} | changes
    )
    with pytest.raises(ValueError, match=message):
        check_plugins(RookWorldGRPOConfig(**settings), plugins)


NAN, INF = float("nan"), float("inf")
BAD_VALUES: list[tuple[str, Any]] = [
    *[(name, value) for name in ("temperature", "beta", "epsilon_high") for value in (NAN, INF, "warm", -1.0)],
    *[(name, -1.0) for name in ("learning_rate", "reward_limit", "kl_warmup_steps")],
    *[
        (name, 0)
        for name in ("temperature", "lora_r", "kl_interval", "recovery_snapshot_steps", "beta_min", "beta_max")
    ],
    *[(name, "nonsense") for name in ("objective", "kl_estimator", "rollout_backend")],
    *[("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.1), ("kl_factor", 1.0)],
    *[("save_only_model", True), ("save_strategy", "best"), ("max_steps", 0)],
    *[("hub_strategy", "every_save"), ("importance_sampling_level", "sentence"), ("scale_rewards", "task")],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name(tmp_path: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` is .*: .+\. [A-Z].+\.$"):
        RookWorldGRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, name: value})


def test_accelerates_choice_of_the_cpu_is_followed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a recipe runs with `accelerate_configs/cpu.yaml` as it stands, and not in bf16."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = RookWorldGRPOConfig(output_dir=str(tmp_path))
    assert (config.use_cpu, config.bf16) == (True, False)


def test_the_command_line_sets_every_new_field(tmp_path: Any) -> None:
    """Each is a key, and its default, written down, is read as what it is; two others are set to something else."""
    names = RookWorldGRPOConfig.__annotations__.keys()
    written = {field.name: shown(field.default) for field in fields(RookWorldGRPOConfig) if field.name in names}
    given = written | {"output_dir": str(tmp_path), "use_cpu": "true", "rollout_backend": "native", "beta": "0.02"}
    (config,) = parse((RookWorldGRPOConfig,), [f"--{name}={value}" for name, value in given.items()])
    plain = RookWorldGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    found = {name: getattr(config, name) for name in written if getattr(config, name) != getattr(plain, name)}
    assert len(written) > 30
    assert found == {"rollout_backend": "native", "beta": 0.02}
