"""Trials of settings: what is kept of a run, and that none was measured on test."""

import json
from pathlib import Path

import pytest

from benchmarks.trials import trial

ROW = {"task": "policy", "mode": "greedy", "metric": "skill", "before": 0.1234567, "difference": None}
ROW |= {"ci_low": None, "ci_high": None, "items": 3, "loss": False, "label": "skill"}


def summary(folder: Path, split: str) -> Path:
    kept = {"eval_split": split, "beta": 0.1, "steps": 7, "metrics": [ROW], "identity": {"starting_weights": "a" * 64}}
    (folder / "summary.json").write_text(json.dumps(kept))
    return folder


def test_settings_start_and_metrics_are_kept_and_no_setting_is_chosen_on_test(tmp_path: Path) -> None:
    found = trial(summary(tmp_path, "dev"))
    assert (found["beta"], found["steps"], found["learning_rate"], found["start"]) == (0.1, 7, None, "a" * 16)
    kept = {"before": 0.12346, "difference": None, "ci_low": None, "ci_high": None, "items": 3, "loss": False}
    assert found["metrics"] == {"policy, greedy": {"skill": kept}}
    with pytest.raises(SystemExit, match="measured on test; settings are chosen on dev"):
        trial(summary(tmp_path, "test"))
