"""The recipes that take a GPU, or long, as they stand but small: a tiny model, a step or two, and what each is for."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chess
import pytest

from recipes import grpo
from rookworld_trl.chess import prompts
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.settings.parser import parse
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.recipes.conftest import run as run_grpo
from tests.support.stockfish import requires_stockfish

ROOT = Path(__file__).parents[2]
LARGE = ROOT / "recipes/rookworld-lm-124m/grpo"
NANO = ROOT / "recipes/nano/grpo"
Run = Callable[..., tuple[RookWorldGRPOTrainer, list[dict[str, Any]]]]


@pytest.fixture
def run(arguments: dict[str, Any], trainers: list[RookWorldGRPOTrainer], rewarded: Any) -> Run:
    """Run a recipe with as few prompts as its shares allow; return its trainer and the rows of metrics.jsonl."""
    small = {"expected_parameters": "null", "gradient_accumulation_steps": 1, "policy_strata": "null"}
    small |= {"eval_policy_items": 1, "eval_environment_items": 1, "eval_split": "dev", "eval_strategy": "no"}
    small |= {"load_best_model_at_end": False, "metric_for_best_model": "null"}

    def start(path: Path, code: int = 0, **changes: Any) -> tuple[RookWorldGRPOTrainer, list[dict[str, Any]]]:
        run_grpo(arguments | small | {"config": path} | changes, code)
        lines = [] if code else (arguments["output_dir"] / "metrics.jsonl").read_text().splitlines()
        return trainers[-1] if trainers else None, [json.loads(line) for line in lines]

    return start


@pytest.mark.slow
def test_lora_trains_adapters_and_saves_them_merged(run: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    trainer, _ = run(LARGE / "config_lora.yaml")
    names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, {"c_attn", "c_proj", "c_fc"})
    trained, start = load_model(tmp_path / "run" / "checkpoint"), load_model(tiny_checkpoint)
    assert trained.config.to_dict().keys() == start.config.to_dict().keys()
    assert not trained.transformer.h[0].attn.c_attn.weight.equal(start.transformer.h[0].attn.c_attn.weight)
    assert trained.transformer.wte.weight.equal(start.transformer.wte.weight)


@pytest.mark.slow
def test_a_curriculum_goes_through_its_stages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped stages, at other steps: shares of `A:` and temperatures of what was sampled, step by step."""
    seen: list[tuple[float, set[float]]] = []
    score = RookWorldGRPOTrainer._generate_and_score_completions

    def spied(self: RookWorldGRPOTrainer, inputs: list[dict[str, Any]]) -> Any:
        batch = score(self, inputs)
        share = sum(row["task"] == "environment" for row in inputs) / len(inputs)
        seen.append((share, {round(each, 3) for each in batch["temperatures"].tolist()}))
        return batch

    monkeypatch.setattr(RookWorldGRPOTrainer, "_generate_and_score_completions", spied)
    run_, *_ = parse(grpo.CLASSES, ["--config", str(NANO / "config_cpu_curriculum.yaml"), "--use_cpu=true"])
    assert run_.stages is not None
    stages = [{**stage, "policy_strata": None} for stage in run_.stages]  # none of the eight positions is in check
    for number, stage in enumerate(stages[:2], start=1):
        stage["until_step"] = number
    trainer, rows = run(
        NANO / "config_cpu_curriculum.yaml",
        stages=json.dumps(stages),
        max_steps=3,
        per_device_train_batch_size=20,
        beta=0.01,
    )
    assert seen == [(0.5, {1.0}), (0.2, {0.85}), (0.2, {0.7})]
    assert [row["curriculum/stage"] for row in rows] == [1, 2, 3]
    assert trainer.controls["stages"].state_dict()["number"] == 2


GAMES = '{"games": 8, "plies": 8, "batches": 2, "per_opening": 4, "temperatures": [1.2, 0.7]}'


@pytest.mark.slow
@requires_stockfish
def test_positions_of_its_own_games(run: Run, rewarded: Any) -> None:
    """Every legal move of theirs is valued by the engine, and the shares of the batch hold."""
    small = {"self_play": GAMES, "engine_nodes": 4000, "engine_cache": "", "max_steps": 3}
    _, rows = run(NANO / "config_cpu_selfplay.yaml", **small)
    assert [row["self_play/temperature"] for row in rows] == [1.2, 1.2, 0.7]
    assert sum(row["self_play/share"] for row in rows) > 1.5, "of three"
    names = ("prompts", "game", "legal_moves", "legal_cp")
    columns = {name: [value for batch in rewarded.seen for value in batch[name]] for name in names}
    seen = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert [sum(row["prompts"].startswith("A:") for row in seen[n : n + 10]) for n in (0, 10, 20)] == [2, 2, 2]
    games = [row for row in seen if row["game"].startswith("self-play") and row["prompts"].startswith("P:")]
    for row in games:
        assert row["legal_moves"] == sorted(move.uci() for move in chess.Board(row["prompts"][3:]).legal_moves)
        assert len(row["legal_cp"]) == len(row["legal_moves"])
    assert games


def test_no_engine_no_games(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STOCKFISH_PATH", "/no/engine")
    for changes, message in (
        ({}, "engine '/no/engine' was not found or cannot be executed; install Stockfish"),
        ({"stages": "[{}]"}, "`self_play` and `stages` both choose the prompts"),
        ({"self_play": "{games: 3}"}, "self_play: missing 4 required positional arguments: 'plies', 'batches'"),
    ):
        run(NANO / "config_cpu_selfplay.yaml", code=2, **changes)
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    words = ["--config", str(NANO / "config_cpu_selfplay.yaml"), "--use_cpu", "true"]
    run_, args, *_ = parse(grpo.CLASSES, words)
    with pytest.raises(ValueError, match=r"`best_move` is 'engine': engine '/no/engine' was not found.*Change `best_"):
        prompts.self_play(run_, args, None, None, None, None)
    for changes, message in (
        ({"world_size": 2}, "`self_play` is given and there are 2 processes: it takes a whole model in one process"),
        ({"world_size": 1, "use_peft": True}, "`self_play` is given and `use_peft` is true: it takes a whole model"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.self_play(run_, SimpleNamespace(**changes), None, None, None, None)


BAD: dict[str, str] = {
    "[{until: 3}, {}]": "stages: stage 1 has a key 'until'; the keys are until_step",
    "[{mix_env_ratio: 0.5}, {}]": "stages: stage 1 would never end; give it an `until_step`",
    "[{until_step: 3}]": "stages: stage 1 is the last and lasts to the end",
    "[{until_step: 3}, {until_step: 2}, {}]": "stage 2: `until_step` is 2; write a step after 3",
    "[{until_pass_rate: 0}, {}]": "stage 1: `until_pass_rate` is 0; write a share above 0",
    "[{temperature: 0}]": "stage 1: `temperature` is 0; write a number above 0",
    "[{mix_env_ratio: 0.33}]": "stages: stage 1: `mix_env_ratio` is 0.33: 1.65 of 5 prompts",
}


def test_bad_stages(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for stages, message in BAD.items():
        run(NANO / "config_cpu.yaml", code=2, stages=stages)
        assert message in capsys.readouterr().err
