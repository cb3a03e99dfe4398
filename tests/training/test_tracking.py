"""What leaves a run: metrics by task, completions as Parquet, and every number at each tracker."""

import inspect
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from transformers import trainer as trainer_module
from trl import GRPOTrainer

import rookworld_trl
from rookworld_trl.training import RookWorldGRPOTrainer
from tests.support.documents import FIELDS_PAGE

Make = Callable[..., RookWorldGRPOTrainer]


def by_prompt(prompts: list[str], completions: list[str], log_metric: Any, **_: Any) -> list[float]:
    """P: prompts earn 1 and 0 in turn, A: prompts 0.5."""
    log_metric("A/parsed", 0.25)
    return [float(row % 2) if prompt[0] == "P" else 0.5 for row, prompt in enumerate(prompts)]


@pytest.fixture
def make(make_trainer: Make, prompts: Dataset) -> Make:
    settings: dict[str, Any] = {"_reward": by_prompt, "rollout_backend": "native", "per_device_train_batch_size": 32}
    data = prompts.add_column("task", [prompt[0] for prompt in prompts["prompt"]])
    return lambda **changes: make_trainer(_data=data, max_steps=1, **settings | changes)


def test_metrics_by_task(make: Make) -> None:
    """All eight prompts are in the batch; groups of A: agree, groups of P: do not."""
    trainer = make()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward/P"] == log["reward/A"] == 0.5
    assert (log["groups/informative/P"], log["groups/informative/A"]) == (1.0, 0.0)
    assert log["groups/informative"] == pytest.approx(5 / 8)
    assert log["A/parsed"] == 0.25
    assert log["rewards/by_prompt/mean"] == 0.5


def test_completions_are_parquet(make: Make, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    make(log_completions=True).train()
    (file,) = (Path(options["output_dir"]) / "completions").glob("*.parquet")
    table = pd.read_parquet(file)
    assert len(table) == 32
    assert {"step", "prompt", "completion", "by_prompt", "task", "advantage"} <= set(table.columns)
    assert (table["prompt"].str[0] == table["task"]).all()
    assert set(table[table["task"] == "A"]["by_prompt"]) == {0.5}
    assert table["prompt"][0] not in capsys.readouterr().out, "the terminal is for the steps"


def logged_names() -> set[str]:
    """The names in the table of docs/recipes.md, as patterns."""
    table = re.search("<!-- logged -->(.*?)<!-- end -->", FIELDS_PAGE.read_text(), flags=re.DOTALL)
    assert table
    firsts = [line.split("|")[1] for line in table[1].splitlines() if line.startswith("| `")]
    return {re.sub(r"<\w+>", "*", name) for first in firsts for name in re.findall(r"`([^`]+)`", first)}


SETTINGS = [{}, {"mining": True}, {"use_gae": True, "scale_rewards": "none"}, {"lr_control": "kl", "beta": 0.1}]


def test_the_table_of_what_is_logged_is_what_is_logged(make: Make, prompts: Dataset) -> None:
    """Each name that runs of several kinds log is in the table, and each of the table is one that some code logs."""
    names, seen = logged_names(), set[str]()
    for settings in SETTINGS:
        trainer = make(**settings)
        trainer.train()
        seen |= {name for row in trainer.state.log_history if "loss" in row for name in row} - {"step"}
    names.remove("*/*")  # the scores of the rewards, which stand under their tasks' names
    known = {name for name in seen if any(fnmatchcase(name, pattern) for pattern in names)}
    assert {name.partition("/")[0] for name in seen - known} == {"A"}
    package = Path(rookworld_trl.__file__).parent
    sources = [
        *package.glob("training/*.py"),
        *package.glob("plugins/*.py"),
        Path(inspect.getsourcefile(GRPOTrainer)),
        Path(trainer_module.__file__),
    ]
    text = "".join(path.read_text() for path in sources)
    for name in names - known:
        logged = any(fnmatchcase(each, name) for each in seen)
        parts = {name.partition("*")[0], name.rpartition("/")[2]}
        assert logged or any(f'"{part}' in text for part in parts), f"nothing logs {name}"
