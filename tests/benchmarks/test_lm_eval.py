"""The tasks for lm-evaluation-harness: prompts and scores are evaluation's own."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.lm_eval import utils
from rookworld_trl.chess.accuracy import HEADLINES, score
from rookworld_trl.chess.dataset import load_shipped

FOLDER = Path(importlib.util.find_spec("benchmarks.lm_eval.utils").origin or "").parent  # type: ignore[union-attr]
TASKS = ("policy", "environment")


class HarnessLoader(yaml.SafeLoader):
    """Reads `!function utils.name` as the harness does."""


HarnessLoader.add_constructor("!function", lambda loader, node: getattr(utils, node.value.removeprefix("utils.")))


def read(name: str) -> dict[str, Any]:
    return yaml.load((FOLDER / f"{name}.yaml").read_text(), HarnessLoader)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The dev split's first rows in place of the test split."""
    shipped = load_shipped("dev").select(range(60))
    monkeypatch.setattr(utils, "load_shipped", lambda split: shipped)
    return list(shipped)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_scores_are_those_of_evaluation(task: Any, few: list[dict[str, Any]]) -> None:
    config = read(f"rookworld_{task}")
    rows = list(config["custom_dataset"](**config["metadata"], **config["dataset_kwargs"])[config["test_split"]])
    assert rows == [row for row in few if row["task"] == task]
    assert [config["doc_to_text"](row) for row in rows] == [row["prompt"] for row in rows]
    assert [config["doc_to_target"](row) for row in rows] == [row["target"] for row in rows]
    assert config["generation_kwargs"]["do_sample"] is False
    # Right, cut in the middle, another row's answer.
    answers = [row["target"] for row in rows]
    answers = [answers[0], answers[1][:20], *answers[3:], answers[2]]
    found = [config["process_results"](row, [text]) for row, text in zip(rows, answers, strict=True)]
    ours = score(rows, answers)[0].estimates()
    names = [metric["metric"] for metric in config["metric_list"]]
    assert set(HEADLINES[task]) < set(names) == set(found[0])
    for metric in config["metric_list"]:
        value = metric["aggregation"]([each[metric["metric"]] for each in found])
        assert value == pytest.approx(ours[metric["metric"]]["value"])
        assert metric["metric"] != "exact" or value < 1
