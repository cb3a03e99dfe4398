"""The stages of a curriculum: when one ends, which rows come, and a resumed run that meets the same ones."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rookworld_trl.plugins.curriculum import WINDOW, Stages
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.plugin import check_plugins
from tests.support.checkpoint_diff import IGNORED, differences

ROWS = 16  # of each stage: eight batches of two prompts


@pytest.fixture
def rows() -> Dataset:
    """Three stages, told apart by the letter of their prompts and their temperature."""
    made = [
        {"prompt": f"{letter}: {place}", "place": place, "temperature": temperature}
        for letter, temperature in (("P", 1.0), ("A", 0.8), ("B", 0.5))
        for place in range(ROWS)
    ]
    return Dataset.from_list(made)


def dealt(rows: Dataset, places: list[int]) -> list[dict[str, Any]]:
    return [rows[place] for place in places]


def staged(rows: Dataset, ends: list[Any]) -> tuple[Stages, list[tuple[str, float]]]:
    """Stages at their first step, and what they log."""
    logged: list[tuple[str, float]] = []
    stages = Stages(rows, ends)
    record = lambda *pair: logged.append(pair)  # noqa: E731
    stages.attach(SimpleNamespace(state=SimpleNamespace(global_step=0), record=record))
    return stages, logged


def test_a_stage_ends_at_its_step_and_the_places_stay(rows: Dataset) -> None:
    stages, logged = staged(rows, [(2, None), (5, None)])
    for step, letter in ((0, "P"), (1, "P"), (2, "A"), (4, "A"), (5, "B"), (7, "B")):
        batch, stages.trainer.state.global_step = dealt(rows, [3, 3, 9]), step
        stages.rows(batch)
        assert [row["prompt"] for row in batch] == [f"{letter}: 3", f"{letter}: 3", f"{letter}: 9"]
        assert logged[-1] == ("curriculum/stage", "PAB".index(letter) + 1)


def test_a_stage_ends_when_enough_pass(rows: Dataset) -> None:
    """By the mean of its last ten batches, none of them another stage's; a batch without rewards says nothing."""
    stages, _ = staged(rows, [(None, 0.5), (None, 0.5)])

    def after(*rewards: float) -> int:
        stages.rewarded([], torch.tensor(rewards))
        stages.rows(dealt(rows, [0]))
        return stages.number

    nan = float("nan")
    assert [after(1.0, 0.99, nan) for _ in range(WINDOW - 1)] == [0] * (WINDOW - 1)
    assert after(nan, nan) == 0
    again, _ = staged(rows, stages.ends)
    again.load_state_dict(stages.state_dict())
    assert after(1.0, 0.0) == 1
    again.rewarded([], torch.tensor([1.0, 0.0]))
    again.rows(dealt(rows, [0]))
    assert again.state_dict() == stages.state_dict() == {"number": 1, "recent": []}
    assert [after(1.0) for _ in range(WINDOW)] == [1] * (WINDOW - 1) + [2]
    assert after(1.0) == 2, "the last one lasts"


def test_rows_of_another_number_of_stages_are_refused(rows: Dataset) -> None:
    for wrong in (rows.select(range(40)), rows.remove_columns("place")):
        with pytest.raises(ValueError, match=r"not those of 3 stages, as many of each, with their `place`"):
            Stages(wrong, [(1, None), (2, None)])


@pytest.mark.parametrize(("vllm", "others"), [(False, 2), (True, 1)])
def test_what_stages_do_not_go_together_with(rows: Dataset, vllm: bool, others: int) -> None:
    args = RookWorldGRPOConfig(use_cpu=True, use_vllm=vllm, vllm_mode="server")
    with pytest.raises(ValueError, match=r"`stages` (and `stages` both choose|goes not with vLLM)"):
        check_plugins(args, [Stages(rows, [(1, None), (2, None)])] * others)


def build(make_trainer: Callable[..., Any], rows: Dataset, **options: Any) -> Any:
    def letters(completions: list[str], **columns: Any) -> list[float]:
        seen.append({prompt[0] for prompt in columns["prompts"]})
        return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]

    seen: list[set[str]] = []
    stages = [Stages(rows, [(2, None), (4, None)])]
    made = make_trainer(_reward=letters, _data=rows, _plugins=stages, shuffle_dataset=False, **options)
    made.seen = seen
    made.add_callback(GatesAgain(made))
    return made


class GatesAgain(TrainerCallback):
    """Each batch passes the gates, not the first alone: each is scored at the temperature it was sampled at."""

    def __init__(self, trainer: RookWorldGRPOTrainer):
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.gates.pending = True


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_a_resumed_run_meets_the_rows_that_it_would_have_met(
    backend: str, rows: Dataset, make_trainer: Callable[..., Any], options: dict[str, Any]
) -> None:
    """Across the end of a stage, each row scored at the temperature that it was sampled at: the gates hold."""
    settings = {"rollout_backend": backend, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    whole, folder = build(make_trainer, rows, **settings), Path(options["output_dir"])
    whole.train()
    assert whole.seen == [{"P"}, {"P"}, {"A"}, {"A"}, {"B"}]
    log = [row for row in whole.state.log_history if "loss" in row]
    assert [row["curriculum/stage"] for row in log] == [1, 1, 2, 2, 3]
    assert all(row["gates/sampler"] < 1e-4 for row in log)
    (folder / "checkpoint-5").rename(folder / "whole")
    resumed = build(make_trainer, rows, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert resumed.seen == whole.seen[1:]
    assert not differences(folder / "whole", folder / "checkpoint-5", ignore=IGNORED)
