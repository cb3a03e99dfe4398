"""The recipes that take a GPU, or long, as they stand but small: a tiny model, a step or two, and what each is for."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chess
import pytest
from datasets import Dataset

from recipes import grpo
from rookworld_trl.chess import prompts
from rookworld_trl.chess.dataset import load_shipped, positions_in
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.settings.parser import parse
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.support.stockfish import requires_stockfish

ROOT = Path(__file__).parents[2]
LARGE = ROOT / "recipes/rookworld-lm-124m/grpo"
NANO = ROOT / "recipes/nano/grpo"
Run = Callable[..., tuple[RookWorldGRPOTrainer, list[dict[str, Any]]]]


def by_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The random model earns -0.3 whatever it writes."""
    return [len(completion) / 20 for completion in completions]


@pytest.fixture
def run(
    tiny_checkpoint: Path,
    rows_file: Path,
    held_out: Dataset,
    trainers: list[RookWorldGRPOTrainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run a recipe with as few prompts as its shares allow; return its trainer and the rows of metrics.jsonl."""
    small = {"model": tiny_checkpoint, "expected_parameters": "null", "output_dir": tmp_path / "run", "max_steps": 2}
    small |= {"dataset": rows_file, "num_generations": 2, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    small |= {"per_device_train_batch_size": 10, "max_completion_length": 12, "use_cpu": True, "bf16": False}
    small |= {"eval_policy_items": 1, "eval_environment_items": 1, "policy_strata": "null", "eval_split": "dev"}
    small |= {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": "null"}

    def start(path: Path, **changes: Any) -> tuple[RookWorldGRPOTrainer, list[dict[str, Any]]]:
        monkeypatch.setattr(prompts, "load_shipped", lambda split, *own: load_shipped(split, *own) if own else held_out)
        monkeypatch.setattr(prompts, "held_out_positions", lambda: positions_in(held_out))
        for name in grpo.REWARDS:
            monkeypatch.setitem(grpo.REWARDS, name, [by_length])
        words = [word for key, value in (small | changes).items() for word in (f"--{key}", str(value))]
        grpo.main(["--config", str(path), *words])
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return trainers[-1], [json.loads(line) for line in lines]

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
def test_positions_of_its_own_games(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every legal move of theirs is valued by the engine, and the shares of the batch hold."""
    seen: list[dict[str, Any]] = []
    score = by_length

    def spied(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        for number, prompt in enumerate(prompts):
            seen.append({name: columns[name][number] for name in ("game", "legal_moves", "legal_cp")} | {"of": prompt})
        return score(prompts, completions)

    monkeypatch.setattr(sys.modules[__name__], "by_length", spied)
    small = {"self_play": GAMES, "engine_nodes": 4000, "engine_cache": "", "max_steps": 3}
    _, rows = run(NANO / "config_cpu_selfplay.yaml", **small)
    assert [row["self_play/temperature"] for row in rows] == [1.2, 1.2, 0.7]
    assert sum(row["self_play/share"] for row in rows) > 1.5, "of three"
    assert [sum(row["of"].startswith("A:") for row in seen[n : n + 10]) for n in (0, 10, 20)] == [2, 2, 2]
    games = [row for row in seen if row["game"].startswith("self-play") and row["of"].startswith("P:")]
    for row in games:
        assert row["legal_moves"] == sorted(move.uci() for move in chess.Board(row["of"][3:]).legal_moves)
        assert len(row["legal_cp"]) == len(row["legal_moves"])
    assert games


def test_no_engine_no_games(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STOCKFISH_PATH", "/no/engine")
    for changes, message in (
        ({}, "engine '/no/engine' was not found or cannot be executed; install Stockfish"),
        ({"stages": "[{}]"}, "`self_play` and `stages` both choose the prompts"),
        ({"self_play": "{games: 3}"}, "self_play: missing 4 required positional arguments: 'plies', 'batches'"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run(NANO / "config_cpu_selfplay.yaml", **changes)
        shown = capsys.readouterr().err.strip().splitlines()
        assert (exit_.value.code, message in shown[-1]) == (2, True), shown
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
        with pytest.raises(SystemExit) as exit_:
            run(NANO / "config_cpu.yaml", stages=stages)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
