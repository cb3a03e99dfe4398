"""No setting is accepted that does nothing: small effects that no other test shows."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from recipes import grpo, sft
from recipes.making.generation import POSITION_SCHEMA
from rookworld_trl.chess import prompts as prompts_module
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import NANO_FOLDER, load_model
from rookworld_trl.plugins import offered
from rookworld_trl.settings.parser import parse
from rookworld_trl.training import GateError, RookWorldGRPOConfig, RookWorldGRPOTrainer
from tests.recipes.test_evaluate import few_rows
from tests.support.documents import blocks
from tests.training.conftest import PROMPTS

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
Make = Callable[..., RookWorldGRPOTrainer]

PROGRAMS = {"grpo": grpo.CLASSES, "sft": sft.CLASSES}


def own(recipe: type, config: type, *plugins: type) -> set[str]:
    """What recipe and plug-ins define, and what the trainer's configuration adds to TRL's or gives another default."""
    added = {field.name for field in fields(config)} & config.__annotations__.keys()
    return {field.name for cls in (recipe, *plugins) for field in fields(cls) if field.init} | added


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_test_names_every_own_field(program: str) -> None:
    """And sets it: as a keyword, a key of a mapping, or an option."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    set_somewhere = set(re.findall(r"\b(\w+)=|[\"'](?:--)?(\w+)(?:=.*?)?[\"']|--(\w+)", text))
    names = {name for groups in set_somewhere for name in groups}
    assert own(*PROGRAMS[program]) - names == set()


def test_every_own_field_is_set_somewhere_and_the_core_has_few() -> None:
    """By a recipe, a preset or an example of the docs; what nobody would turn is a constant."""
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
    shown = [code for page in pages for kind in ("yaml", "bash", "text") for code in blocks(page.read_text(), kind)]
    shown += [recipe.read_text(encoding="utf-8") for recipe in ROOT.glob("recipes/**/*.yaml")]
    words = {word for text in shown for word in re.findall(r"\w+", text)}
    core = {field.name for field in fields(RookWorldGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    written = {"from_run"}  # by `--from`, which is what people give
    assert (core | {field.name for cls in offered() for field in fields(cls) if field.init}) - words == written
    assert len(core) <= 40


# What no other test shows


def recipe_of(**changes: Any) -> tuple[Any, ...]:
    settings = {"output_dir": "run", "use_cpu": "true", "report_to": "none", "max_steps": 1, **changes}
    return parse(grpo.CLASSES, [f"--{key}={value}" for key, value in settings.items()])


def test_a_folders_split_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(split: str, folder: Path) -> None:
        raise LookupError(split, folder)

    monkeypatch.setattr(prompts_module, "load_shipped", asked)
    with pytest.raises(LookupError) as caught:
        prompts_module.training_prompts(*recipe_of(dataset=tmp_path, dataset_split="dev")[:2])
    assert caught.value.args == ("dev", tmp_path)


def test_as_many_items_of_the_split_are_measured_as_are_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    shipped = {split: load_shipped(split, few_rows(tmp_path, split)) for split in ("dev", "test")}
    monkeypatch.setattr(prompts_module, "load_shipped", shipped.__getitem__)
    monkeypatch.setattr(prompts_module, "training_prompts", lambda run, args, watched: shipped["dev"].select([0]))
    monkeypatch.setattr(prompts_module, "check_lengths", lambda *_: None)
    for split in ("dev", "test"):
        changes = {"eval_policy_items": 3, "eval_environment_items": 2, "eval_batch_size": 5}
        run, args, *_ = recipe_of(eval_split=split, **changes)
        held_out, *_ = prompts_module.held_out_and_training_prompts(run, args, None, 0)
        assert sorted(held_out["task"]) == ["environment"] * 2 + ["policy"] * 3
        assert set(held_out["prompt"]) <= set(shipped[split]["prompt"])
        assert run.decoding(args)["batch_size"] == 5


def test_drafts_are_for_the_task_that_is_named(make_trainer: Make) -> None:
    kinds = [prompt[0] for prompt in PROMPTS]
    data = Dataset.from_dict({"prompt": PROMPTS, "task": kinds, "target": ["ab"] * len(kinds)})
    for task in ("A", "P"):
        trainer = make_trainer(_data=data, rollout_backend="native", target_task=task)
        drafts = [trainer.sampler.request(row).draft for row in trainer.train_dataset]
        assert [draft is not None for draft in drafts] == [prompt[0] == task for prompt in PROMPTS]


def test_a_controlled_beta_moves_by_its_factor_within_its_bounds(make_trainer: Make) -> None:
    bounds = {"beta": 0.1, "beta_min": 0.09, "beta_max": 0.35}
    trainer = make_trainer(kl_control="multiplicative", kl_interval=1, kl_factor=2.0, **bounds)
    found = []
    for kl in (1.0, 1.0, 0.0, 0.0):
        trainer.kl.controller.update(kl)
        found.append(trainer.kl.controller.beta)
    assert found == pytest.approx([0.2, 0.35, 0.175, 0.09])


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
        "trl.trainer.grpo_trainer.print_prompt_completions_sample", lambda *parts, **_: asked.append(parts[5])
    )
    make_trainer(log_completions=True, num_completions_to_print=3, max_steps=1).train()
    assert set(asked) == {3}


def test_a_model_that_keeps_its_dropout_is_refused(make_trainer: Make) -> None:
    with pytest.raises(GateError, match=r"gate 'dropout' FAILS"):
        make_trainer(disable_dropout=False, share_prefixes=False).train()


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
        return sft.build(*parse(sft.CLASSES, words))

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


@pytest.mark.slow
def test_supervised_training_is_quiet_if_asked_for(supervised, tmp_path, capsys) -> None:
    settings = {"positions": tmp_path, "output_dir": tmp_path / "run", "use_cpu": "true", "bf16": "false"}
    settings |= {"per_device_train_batch_size": 1, "report_to": "none", "n_layer": 1, "n_embd": 16, "n_head": 2}
    settings |= {"max_steps": 1, "quiet": "true", "save_strategy": "no", "logging_steps": 1}
    assert sft.program([f"--{name}={value}" for name, value in settings.items()]) == 0
    assert capsys.readouterr().out == ""
