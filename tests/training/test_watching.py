"""Held-out metrics while training: no trace in what is trained, the best checkpoint kept, and both over a restart."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rookworld_trl.checkpointing.trainer import DurableGRPOTrainer
from rookworld_trl.plugins.live import METRICS_FILE, report_live
from tests.support.checkpoint_diff import EACH_START, WALL_CLOCK
from tests.support.plugged import plugin_of
from tests.support.toy import StopAt, make_trainer, prompts

VALUES = {2: 0.3, 4: 0.7, 6: float("nan"), 8: 0.5}  # the held-out metric by step; undefined at step 6
WATCH = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8, "metric_for_best_model": "score"}


def watched(folder: Path, values: dict[int, float] = VALUES, **changes: Any) -> Any:
    """A trainer whose evaluator draws from every generator, as a careless one may."""
    trainer = make_trainer(folder, held_out=prompts(4), **{**WATCH, "save_total_limit": 2, **changes})

    def evaluator(model: Any, rows: Any) -> dict[str, float]:
        assert not model.training
        assert len(rows) == 4
        random.random(), np.random.rand(), torch.rand(1)
        return {"score": values[trainer.state.global_step], "other": 1.0}

    trainer.watch_with(evaluator)
    report_live(trainer, folder)
    return trainer


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def learned(folder: Path) -> list[dict[str, Any]]:
    """The rows of training, without times and gates."""
    timed = ("seconds", *(name.strip("*") for name in (*WALL_CLOCK, *EACH_START)))
    rows = [row for row in logged(folder) if "loss" in row]
    return [{key: v for key, v in row.items() if not any(name in key for name in timed)} for row in rows]


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_training_is_the_same_with_evaluation_and_without(logging_steps: int, tmp_path: Path) -> None:
    """Evaluated in the middle of a logging interval, too, training's averages go over all of it; and TRL's own
    evaluation leaves no trace either."""
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": logging_steps}
    held_out = {"held_out": prompts(4), "eval_strategy": "steps", "eval_steps": 2}
    weights = []
    for name in ("plain", "ours", "stock") if logging_steps == 1 else ("plain", "ours"):
        if name == "ours":
            trainer = watched(tmp_path / name, **options)
        else:
            trainer = make_trainer(tmp_path / name, **options, **(held_out if name == "stock" else {}))
            report_live(trainer, tmp_path / name)
        trainer.train()
        weights.append(list(trainer.model.state_dict().values()))
        assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[-1], strict=True))
        assert learned(tmp_path / name) == learned(tmp_path / "plain")
        assert not any(key.startswith("eval_") for row in learned(tmp_path / name) for key in row)
    assert len(learned(tmp_path / "plain")) == 4 // logging_steps
    assert [row["eval_score"] for row in logged(tmp_path / "ours") if "eval_score" in row] == [0.3, 0.7]
    if logging_steps == 1:
        assert sum("eval_reward" in row for row in logged(tmp_path / "stock")) == 2


def test_the_best_checkpoint_is_kept_and_put_back_and_known_after_a_restart(tmp_path: Path) -> None:
    whole = watched(tmp_path / "whole", load_best_model_at_end=True)
    whole.train()
    names = {path.name for path in (tmp_path / "whole").glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}, "the newest two and the best"
    best, last = (load_file(tmp_path / "whole" / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8))
    now = whole.model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in best.items())
    assert not all(torch.equal(now[name], weight) for name, weight in last.items())
    first = watched(tmp_path / "parts", load_best_model_at_end=True)
    first.add_callback(StopAt(6))
    first.train()
    second = watched(tmp_path / "parts", load_best_model_at_end=True)
    second.train(resume_from_checkpoint=True)
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole")
    for trainer, name in ((whole, "whole"), (second, "parts")):
        assert (trainer.state.best_metric, trainer.best_step) == (0.7, 4)
        rows = [row for row in logged(tmp_path / name) if "eval_score" in row]
        found = [(row["step"], row["eval_best"], row["eval_best_step"]) for row in rows]
        assert found == [(2, 0.3, 2), (4, 0.7, 4), (6, 0.7, 4), (8, 0.7, 4)]
    assert all(torch.equal(weight, now[name]) for name, weight in second.model.state_dict().items())


def test_less_may_be_better(tmp_path: Path) -> None:
    trainer = watched(tmp_path, greater_is_better=False)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.3, 2)
    assert trainer.best_step is None, "the last step's weights are the result"
    assert logged(tmp_path)[-1]["eval_best_step"] == 2


def test_a_time_limit_measures_the_last_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = watched(tmp_path, {3: 0.9, **VALUES}, load_best_model_at_end=True, max_train_minutes=1e6)
    limit = plugin_of(trainer, "max_train_minutes")

    class Over(StopAt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                limit.max_train_minutes = 1e-9

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Nothing: the limit ends the run."""

    trainer.add_callback(Over(0))
    trainer.train()
    assert (trainer.state.global_step, trainer.best_step) == (3, 3)


def test_shards_are_not_watched_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(DurableGRPOTrainer, "sharded", True)
    trainer = watched(tmp_path, load_best_model_at_end=True, max_steps=4, recovery=False)
    trainer.train()
    assert (trainer.state.global_step, trainer.best_step) == (4, None)
    assert not [row for row in logged(tmp_path) if "eval_score" in row]
    said = [record.message for record in caplog.records if "are off in this run" in record.message]
    assert len(said) == 1
    assert "its weights are in shards" in said[0]


def test_the_best_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`load_best_model_at_end` is True: .* Set `metric_for_best_model`"):
        watched(tmp_path, metric_for_best_model=None, load_best_model_at_end=True)
