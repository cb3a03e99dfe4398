"""A run's settings in one file, and a new run from another one's."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rookworld_trl.plugins.origin import forked
from rookworld_trl.settings.parser import RecipeError
from tests.recipes.conftest import arguments, held_out, rows_file, run, summary_of  # noqa: F401
from tests.recipes.test_sft_durable import run as run_sft  # noqa: F401
from tests.recipes.test_sft_durable import shards  # noqa: F401


def test_a_new_run_takes_settings_and_model_of_another(arguments, tmp_path, capsys, monkeypatch):  # noqa: F811
    """What is set anew wins and is named; secrets, and what says how a run was started, are not kept."""
    monkeypatch.setenv("ROOKWORLD_BETA", "0.02")
    parent, child = arguments["output_dir"], tmp_path / "child"
    run(arguments | {"max_steps": 1, "hub_token": "hf_secretsecret", "policy_strata": "{check: 0}"})
    kept = yaml.safe_load((parent / "recipe.yaml").read_text())
    assert (kept["beta"], kept["learning_rate"], kept["num_generations"], kept["bf16"]) == (0.02, 1e-3, 2, False)
    assert kept["policy_strata"] == {"check": 0}
    assert not {"hub_token", "output_dir"} & set(kept)
    assert "secret" not in (parent / "recipe.yaml").read_text()
    monkeypatch.delenv("ROOKWORLD_BETA")

    words = {"from": parent, "output_dir": child, "learning_rate": 5e-4, "top_entropy_quantile": 1.0}
    run(words | {"dry_run": True})
    said = f"from {parent}: `learning_rate` was 0.001 and is 0.0005; `top_entropy_quantile` was None and is 1.0"
    assert said in capsys.readouterr().out
    assert not child.exists()
    run(words)
    assert said in capsys.readouterr().out
    summary = summary_of({"output_dir": child})
    assert (summary["model"], summary["from_run"], summary["steps"]) == (str(parent / "checkpoint"), str(parent), 1)
    assert summary["changed"] == {"learning_rate": [1e-3, 5e-4], "top_entropy_quantile": [None, 1.0]}


def test_supervised_training_too(run_sft: Any, tmp_path: Path) -> None:  # noqa: F811
    run_sft()
    run_sft(**{"from": tmp_path / "run", "output_dir": tmp_path / "child", "max_steps": 1})
    facts = json.loads((tmp_path / "child" / "training.json").read_text())
    assert (facts["init_from"], facts["steps"], facts["changed"]) == (str(tmp_path / "run"), 1, {"max_steps": [4, 1]})


def test_what_cannot_be_a_start_is_refused(tmp_path: Path) -> None:
    folder = ["--output_dir", "x"]
    assert forked(["--config", "a.yaml"]) == ["--config", "a.yaml"]
    with pytest.raises(RecipeError, match=r"there is no recipe\.yaml; give that run's --config and its --model"):
        forked(["--from", str(tmp_path), *folder])
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match="needs a folder of its own; give --output_dir"):
        forked([f"--from={tmp_path}"])
    with pytest.raises(RecipeError, match="neither a trained model nor a checkpoint that verifies"):
        forked(["--from", str(tmp_path), *folder])
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    words = ["--config", f"{tmp_path}/recipe.yaml", "--model", str(checkpoint), "--from_run", str(checkpoint), *folder]
    assert forked(["--from", str(checkpoint), *folder]) == words
