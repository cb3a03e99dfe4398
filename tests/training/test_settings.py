"""No setting is accepted that does nothing: each own field of the recipes and trainers, and the test that shows what it
does or how it is refused. A new field without an entry fails; small effects that no other test shows are shown here."""

import ast
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from recipes import grpo, sft
from recipes.making.generation import POSITION_SCHEMA
from rookworld_trl.chess import prompts as prompts_module
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import NANO_FOLDER, load_model
from rookworld_trl.settings.parser import parse
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.supervised import SupervisedConfig
from tests.training.conftest import PROMPTS, share_of_letters

TESTS = Path(__file__).parents[1]
HERE = "training/test_settings.py"
Make = Callable[..., RookWorldGRPOTrainer]

# The file of each test under tests/, and which fields it shows.
SHOWN: dict[str, dict[str, str]] = {
    "recipes/test_grpo.py": {
        "model": "test_bad_settings",
        "dataset": "test_bad_settings",
        "max_train_minutes": "test_a_time_limit_stops_early",
        "eval_dataset": "test_held_out_rows_are_watched_on_the_way_and_the_best_step_is_the_result",
        "eval_items": "test_held_out_rows_are_watched_on_the_way_and_the_best_step_is_the_result",
        "quiet": "test_json_quiet_and_a_log_file",
        "json": "test_json_quiet_and_a_log_file",
        "log_file": "test_json_quiet_and_a_log_file",
    },
    "recipes/test_push.py": {
        "model_revision": "test_the_commit_of_a_model_of_the_hub_is_kept",
        "hub_strategy": "test_the_run_ends_on_the_hub",
    },
    "modeling/test_loading.py": {"expected_parameters": "test_model_and_tokenizer_must_fit"},
    "recipes/test_rookworld.py": {
        "leading_eos": "test_rookworlds_rows_and_checkpoint_train",
        "spelling": "test_the_probe_follows_answers_in_the_spelling_that_the_recipe_names",
    },
    "chess/test_rookworld.py": {
        "best_move": "test_blacks_best_move_is_the_best_of_its_evals",
        "guess_unlisted": "test_values_of_unlisted_moves_are_guessed_by_an_explicit_key_only",
        "illegal": "test_illegal_moves_labelled_as_legal_are_found",
        "streaming": "test_a_stream_gives_the_same_rows",
        "max_rows": "test_a_stream_gives_the_same_rows",
    },
    "chess/test_values.py": {
        "engine_nodes": "test_stockfish_values_a_users_prompts_once",
        "engine_workers": "test_stockfish_values_a_users_prompts_once",
        "engine_cache": "test_stockfish_values_a_users_prompts_once",
    },
    "chess/test_mixing.py": {
        "mix_env_ratio": "test_every_batch_holds_exactly_the_ratio_through_the_sampler_of_trl",
        "policy_strata": "test_every_batch_holds_exactly_the_share_of_a_stratum",
    },
    "recipes/test_recipes_run.py": {
        "stages": "test_a_curriculum_goes_through_its_stages",
        "self_play": "test_positions_of_its_own_games",
        "lora_alpha": "test_lora_trains_adapters_and_saves_them_merged",
    },
    "training/test_trainer.py": {
        "beta": "test_no_reference_with_beta_zero",
        "temperature": "test_native_rollout_gets_the_trainers_settings",
        "bf16": "test_the_head_scores_in_float32_under_autocast",
        "share_prefixes": "test_the_head_scores_in_float32_under_autocast",
        "rollout_backend": "test_backend_choice",
        "learning_rate": "test_training_passes_the_gates_then_updates",
    },
    "training/test_advantages_in_training.py": {
        "scale_rewards": "test_our_group_mean_is_trls",
        "advantage_baseline": "test_ema_goes_by_the_task_column",
        "use_gae": "test_first_gae_advantages_by_hand",
        "gae_gamma": "test_first_gae_advantages_by_hand",
        "gae_lambda": "test_first_gae_advantages_by_hand",
    },
    "training/test_kl.py": {"kl_type": "test_k1_and_k3_are_unbiased"},
    "training/test_loss.py": {
        "loss_type": "test_weights_of_tokens_by_hand",
        "epsilon_high": "test_every_option_is_trls",
    },
    "training/test_kl_in_training.py": {
        "kl_estimator": "test_exact_kl_of_the_batch_by_full_logits",
        "kl_control": "test_adaptive_beta_and_warmup_are_logged",
        "kl_target": "test_adaptive_beta_and_warmup_are_logged",
        "kl_warmup_steps": "test_adaptive_beta_and_warmup_are_logged",
        "kl_stop_threshold": "test_stop_is_graceful",
        "reference_reset_steps": "test_reference_reset",
    },
    "training/test_config.py": {"gradient_checkpointing": "test_nothing_warns_of_what_the_user_did_not_set"},
    "training/test_watching.py": {"logging_steps": "test_a_log_of_several_steps_is_not_cut_by_an_evaluation"},
    "training/test_trl_seams.py": {
        "logging_nan_inf_filter": "test_the_step_is_refused_by_taking_its_gradients_away",
    },
    "training/test_task_sampling.py": {
        "task_sampling": "test_rows_are_sampled_and_scored_at_their_own_temperature",
        "draft_rollouts": "test_drafts_change_no_sample",
    },
    "training/test_exact_in_training.py": {"objective": "test_the_update_is_the_gradient_of_the_sum"},
    "training/test_mining.py": {
        "mining": "test_a_mined_batch",
        "mining_ordinary": "test_a_mined_batch",
        "mining_rounds": "test_only_zero_variance_groups_are_sampled_again",
    },
    "training/test_adapters.py": {
        "use_peft": "test_only_adapters_train",
        "lora_target_modules": "test_only_adapters_train",
    },
    "faults/test_recovery.py": {
        "recovery": "test_without_recovery_the_same_fault_poisons",
        "recovery_max_attempts": "test_the_fourth_failure_in_a_row_ends_the_run",
        "recovery_snapshot_steps": "test_back_to_the_last_state_that_had_a_good_step_after_it",
    },
    "faults/test_rewards.py": {"reward_limit": "test_absurd_rewards_in_training"},
    "faults/test_resume_rules.py": {
        "auto_resume": "test_auto_resume_of_a_finished_run",
        "recovery_mode": "test_recovery_halves_the_rate_and_tightens_the_kl_for_good",
        "stable_after_steps": "test_without_recovery_checkpoints_become_stable_too",
    },
    "training/test_schedules.py": {
        "lr_schedule": "test_a_run_follows_the_curve",
        "lr_control": "test_a_controlled_rate_in_a_run",
        "lr_floor": "test_a_run_follows_the_curve",
        "lr_decay_steps": "test_a_run_follows_the_curve",
        "kl_interval": "test_a_controlled_rate_in_a_run",
    },
    "training/test_monitor.py": {
        "health_bands": "test_a_run_records_health_and_truth",
        "health_patience": "test_a_run_records_health_and_truth",
        "peak_tflops": "test_a_run_records_health_and_truth",
        "alert": "test_a_run_alerts_at_red_and_at_its_end",
    },
    "training/test_placement.py": {
        "torch_compile": "test_accelerate_says_what_is_compiled_unless_the_fields_do",
        "ref_device": "test_a_reference_on_another_device_gives_the_same_run",
        "attn_implementation": "test_the_attention_kernel_is_the_one_asked_for",
    },
    "training/test_micro_batch.py": {
        "auto_batch_size": "test_sampling_counts_too",
        "memory_share": "test_sampling_counts_too",
    },
    HERE: {
        "reward": "test_the_reward_that_is_named_is_the_one_that_is_paid",
        "dataset_split": "test_a_folders_split_is_the_one_that_is_named",
        "eval_split": "test_as_many_items_of_the_split_are_measured_as_are_asked_for",
        "eval_policy_items": "test_as_many_items_of_the_split_are_measured_as_are_asked_for",
        "eval_environment_items": "test_as_many_items_of_the_split_are_measured_as_are_asked_for",
        "eval_batch_size": "test_as_many_items_of_the_split_are_measured_as_are_asked_for",
        "task_column": "test_columns_have_the_names_that_they_are_given",
        "target_column": "test_columns_have_the_names_that_they_are_given",
        "target_task": "test_drafts_are_for_the_task_that_is_named",
        "target_rows": "test_right_answers_are_followed_on_so_many_rows_so_often",
        "target_every": "test_right_answers_are_followed_on_so_many_rows_so_often",
        "lora_r": "test_adapters_have_the_rank_that_is_asked_for",
        "kl_factor": "test_a_controlled_beta_moves_by_its_factor_within_its_bounds",
        "beta_min": "test_a_controlled_beta_moves_by_its_factor_within_its_bounds",
        "beta_max": "test_a_controlled_beta_moves_by_its_factor_within_its_bounds",
        "reference_reset_stall": "test_a_reference_is_reset_where_the_kl_stands_still",
        "num_generations_eval": "test_trls_own_evaluation_samples_as_often_as_is_asked_for",
        "num_completions_to_print": "test_as_many_completions_are_printed_as_are_asked_for",
        "dataloader_pin_memory": "test_what_has_one_right_value_is_refused_at_another",
        "disable_dropout": "test_what_has_one_right_value_is_refused_at_another",
    },
}

SUPERVISED: dict[str, dict[str, str]] = {
    "recipes/test_sft.py": {
        "positions": "test_there_must_be_positions_for_a_step",
        "mirror": "test_mirrored_positions_are_shown_too",
        "tokenizer": "test_a_new_model_has_the_tokenizer_asked_for",
        "muon_lr": "test_muon_takes_the_block_matrices_and_adamw_the_rest",
    },
    "recipes/test_sft_durable.py": {
        "json": "test_json_and_the_metrics_of_each_log",
        "log_file": "test_json_and_the_metrics_of_each_log",
        "recovery_mode": "test_recovery_goes_back_to_a_stable_checkpoint_at_half_the_rates",
    },
    "training/test_config.py": {"gradient_checkpointing": "test_nothing_warns_of_what_the_user_did_not_set"},
    "training/test_placement.py": {"torch_compile": "test_accelerate_says_what_is_compiled_unless_the_fields_do"},
    HERE: {
        "alert": "test_supervised_training_refuses_an_alert_that_is_no_command",
        "quiet": "test_supervised_training_is_quiet_if_asked_for",
        "init_from": "test_supervised_training_starts_from_what_is_named",
        "optimizer": "test_supervised_training_starts_from_what_is_named",
        **dict.fromkeys(("n_layer", "n_embd", "n_head", "n_positions"), "test_a_new_model_has_the_size_asked_for"),
    },
}
PROGRAMS = {
    "grpo": (SHOWN, grpo.RunConfig, RookWorldGRPOConfig),
    "sft": (SUPERVISED, sft.SFTRecipe, SupervisedConfig),
}


def own(recipe: type, config: type) -> set[str]:
    """What the recipe defines, and what its trainer's configuration adds to TRL's or gives another default."""
    added = {field.name for field in fields(config)} & config.__annotations__.keys()
    return {field.name for field in fields(recipe)} | added


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_own_field_has_its_test_and_no_other(program: str) -> None:
    shown, recipe, config = PROGRAMS[program]
    names = [name for by_field in shown.values() for name in by_field]
    assert len(names) == len(set(names))
    assert set(names) == own(recipe, config)


@cache
def parsed(file: str) -> dict[str, str]:
    """Source of each function and constant of a test file, by name, what decorates it included."""
    text, found = (TESTS / file).read_text(), {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        mine = [node.name] if isinstance(node, ast.FunctionDef) else names
        found |= dict.fromkeys(mine, "\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return found


def words_of(file: str, test: str) -> set[str]:
    """All words of a test, and of the fixtures and constants that it takes from its file and the folder's conftest."""
    shared = Path(file).with_name("conftest.py")
    sources = (parsed(str(shared)) if (TESTS / shared).exists() else {}) | parsed(file)
    words, pending = set[str](), [test]
    while pending:
        mine = set(re.findall(r"\w+", sources[pending.pop()])) - words
        words |= mine
        pending += [name for name in mine if name in sources and name != test]
    return words


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tests_are_there_and_name_their_fields(program: str) -> None:
    for file, by_field in PROGRAMS[program][0].items():
        for name, test in by_field.items():
            assert test in parsed(file), f"{file} has no {test}"
            assert name in words_of(file, test), f"{test} of {file} does not name {name}"


# What no other test shows


def recipe_of(**changes: Any) -> tuple[grpo.RunConfig, RookWorldGRPOConfig]:
    settings = {"output_dir": "run", "use_cpu": "true", "report_to": "none", "max_steps": 1, **changes}
    return parse((grpo.RunConfig, RookWorldGRPOConfig), [f"--{key}={value}" for key, value in settings.items()])


@pytest.mark.slow
def test_the_reward_that_is_named_is_the_one_that_is_paid(tmp_path: Path) -> None:
    changes = {"num_generations": 2, "per_device_train_batch_size": 10, "max_completion_length": 20}
    trainer, _ = grpo.build(*recipe_of(reward="continuous", output_dir=tmp_path, **changes))
    found = [each.__name__ for each in trainer.reward_funcs]
    assert found == ["policy_reward_continuous", "environment_reward_continuous"]


def test_a_folders_split_is_the_one_that_is_named() -> None:
    folder = NANO_FOLDER.parent / "data"
    found = [len(prompts_module._read(recipe_of(dataset=folder, dataset_split=split)[0])) for split in ("dev", "test")]
    assert found == [len(load_shipped(split)) for split in ("dev", "test")]
    assert found[0] != found[1]


def test_as_many_items_of_the_split_are_measured_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"eval_policy_items": 3, "eval_environment_items": 2, "eval_batch_size": 5}
    monkeypatch.setattr(prompts_module, "training_prompts", lambda run, args, watched: load_shipped("dev").select([0]))
    monkeypatch.setattr(prompts_module, "check_lengths", lambda *_: None)
    for split in ("dev", "test"):
        run, args = recipe_of(eval_split=split, **changes)
        held_out, *_ = prompts_module.held_out_and_training_prompts(run, args, None, 0)
        assert sorted(held_out["task"]) == ["environment"] * 2 + ["policy"] * 3
        assert set(held_out["prompt"]) <= set(load_shipped(split)["prompt"])
        assert run.decoding(args)["batch_size"] == 5


@pytest.fixture
def on_rows(policy: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> Make:
    """A trainer on the toy prompts with right answers and kinds, by native rollouts."""
    kinds = [prompt[0] for prompt in PROMPTS]
    data = Dataset.from_dict({"prompt": PROMPTS, "kind": kinds, "right": ["ab"] * len(kinds)})

    def make(**changes: Any) -> RookWorldGRPOTrainer:
        args = RookWorldGRPOConfig(**{**options, "per_device_train_batch_size": 32, **changes})
        return RookWorldGRPOTrainer(policy, share_of_letters, args, data, None, tiny_tokenizer)

    return make


def test_columns_have_the_names_that_they_are_given(on_rows: Make) -> None:
    plain, named = on_rows(max_steps=1), on_rows(max_steps=1, task_column="kind", target_column="right")
    assert (len(plain.target_probe.rows), len(named.target_probe.rows)) == (0, len(PROMPTS))
    named.train()
    assert {"reward/A", "reward/P"} <= named.state.log_history[0].keys()


def test_drafts_are_for_the_task_that_is_named(on_rows: Make) -> None:
    columns = {"task_column": "kind", "target_column": "right"}
    for task in ("A", "P"):
        trainer = on_rows(**columns, target_task=task)
        drafts = [trainer.sampler.request(row).draft for row in trainer.train_dataset]
        assert [draft is not None for draft in drafts] == [prompt[0] == task for prompt in PROMPTS]


def test_right_answers_are_followed_on_so_many_rows_so_often(on_rows: Make) -> None:
    trainer = on_rows(target_column="right", target_rows=3, target_every=2, max_steps=2)
    assert len(trainer.target_probe.rows) == 3
    trainer.train()
    assert ["truth/logp" in row for row in trainer.state.log_history[:2]] == [False, True]


def test_adapters_have_the_rank_that_is_asked_for(make_trainer: Make) -> None:
    model = make_trainer(use_peft=True, lora_r=3, rollout_backend="auto").model
    assert {len(weight) for name, weight in model.named_parameters() if "lora_A" in name} == {3}


def test_a_controlled_beta_moves_by_its_factor_within_its_bounds(make_trainer: Make) -> None:
    bounds = {"beta": 0.1, "beta_min": 0.09, "beta_max": 0.35}
    trainer = make_trainer(kl_control="multiplicative", kl_interval=1, kl_factor=2.0, **bounds)
    found = []
    for kl in (1.0, 1.0, 0.0, 0.0):
        trainer.kl.controller.update(kl, 8)
        found.append(trainer.kl.controller.beta)
    assert found == pytest.approx([0.2, 0.35, 0.175, 0.09])


def test_a_reference_is_reset_where_the_kl_stands_still(make_trainer: Make) -> None:
    reset = make_trainer(reference_reset_stall=4).kl.reset
    due = []
    for kl in (0.1, 0.2, 0.3, 0.3, 0.3, 0.3):
        reset.observe(kl)
        due.append(reset.due)
    assert due == [False] * 5 + [True]


def test_trls_own_evaluation_samples_as_often_as_is_asked_for(make_trainer: Make) -> None:
    calls: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    for generations in (1, 2):
        calls.clear()
        trainer = make_trainer(_reward=reward, num_generations_eval=generations, per_device_eval_batch_size=8)
        trainer.evaluate(trainer.train_dataset)
        assert sum(calls) == generations * len(PROMPTS)


def test_as_many_completions_are_printed_as_are_asked_for(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.print_prompt_completions_sample",
        lambda *parts, **_: asked.append(parts[5]),
    )
    make_trainer(log_completions=True, num_completions_to_print=3, max_steps=1).train()
    assert set(asked) == {3}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("dataloader_pin_memory", True, "batches are lists of Python rows"), ("disable_dropout", False, "with dropout")],
)
def test_what_has_one_right_value_is_refused_at_another(
    options: dict[str, Any], name: str, value: bool, why: str
) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` is {value}: {why}.* Leave it"):
        RookWorldGRPOConfig(**{**options, name: value})


@pytest.fixture
def supervised(tmp_path: Path) -> Callable[..., sft.SupervisedTrainer]:
    """The recipe's trainer over three positions."""
    record = {"history": "", "moves": ["b1a1"], "cp": [0], "played": "b1a1", "game": 0}
    rows = [record | {"fen": f"6k1/8/8/8/8/8/PPP{n}P{4 - n}/1K6 w - - 0 1"} for n in (1, 2, 3)]
    pq.write_table(pa.Table.from_pylist(rows, schema=POSITION_SCHEMA), tmp_path / "positions-00000.parquet")

    def build(**changes: Any) -> sft.SupervisedTrainer:
        settings = {"positions": tmp_path, "output_dir": tmp_path / "run", "use_cpu": "true", "bf16": "false"}
        settings |= {"per_device_train_batch_size": 1, "report_to": "none", **changes}
        words = [f"--{name}={value}" for name, value in settings.items()]
        return sft.build(*parse((sft.SFTRecipe, SupervisedConfig), words))

    return build


def test_a_new_model_has_the_size_asked_for(supervised: Callable[..., sft.SupervisedTrainer]) -> None:
    size = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 200}
    config = supervised(**size).model.config
    assert {name: getattr(config, name) for name in size} == size


def test_supervised_training_starts_from_what_is_named(supervised: Callable[..., sft.SupervisedTrainer]) -> None:
    for optimizer in ("muon", "adamw"):
        trainer = supervised(init_from=NANO_FOLDER, optimizer=optimizer, max_steps=1)
        start = load_model(NANO_FOLDER).state_dict()
        assert all(torch.equal(weight, start[name]) for name, weight in trainer.model.state_dict().items())
        groups = trainer.create_optimizer().param_groups
        assert any(group.get("use_muon") for group in groups) == (optimizer == "muon")


def test_supervised_training_refuses_an_alert_that_is_no_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`alert` is \"mail 'x\": No closing quotation"):
        SupervisedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, alert="mail 'x")


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [False, True])
def test_supervised_training_is_quiet_if_asked_for(
    supervised: Callable[..., sft.SupervisedTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    settings = {"positions": tmp_path, "output_dir": tmp_path / "run", "use_cpu": "true", "bf16": "false"}
    settings |= {"per_device_train_batch_size": 1, "report_to": "none", "n_layer": 1, "n_embd": 16, "n_head": 2}
    settings |= {"max_steps": 1, "quiet": str(quiet).lower(), "save_strategy": "no", "logging_steps": 1}
    assert sft.program([f"--{name}={value}" for name, value in settings.items()]) == 0
    assert ("step 1/1  loss" in capsys.readouterr().out) != quiet
