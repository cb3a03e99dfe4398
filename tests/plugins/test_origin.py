"""A run's settings in one file, which starts another run like it."""

import yaml

from tests.recipes.conftest import arguments, held_out, rows_file, run, summary_of  # noqa: F401


def test_a_run_keeps_its_settings_for_another_one(arguments, tmp_path, monkeypatch):  # noqa: F811
    """Those of the environment too; neither secrets nor what says how a run was started."""
    monkeypatch.setenv("ROOKWORLD_BETA", "0.02")
    parent, child = arguments["output_dir"], tmp_path / "child"
    run(arguments | {"max_steps": 1, "hub_token": "hf_secretsecret", "policy_strata": "{check: 0}"})
    kept = yaml.safe_load((parent / "recipe.yaml").read_text())
    assert (kept["beta"], kept["learning_rate"], kept["num_generations"], kept["bf16"]) == (0.02, 1e-3, 2, False)
    assert kept["policy_strata"] == {"check": 0}
    assert not {"hub_token", "output_dir"} & set(kept)
    assert "secret" not in (parent / "recipe.yaml").read_text()
    monkeypatch.delenv("ROOKWORLD_BETA")
    run({"config": parent / "recipe.yaml", "model": parent / "checkpoint", "output_dir": child, "learning_rate": 5e-4})
    summary = summary_of({"output_dir": child})
    assert (summary["model"], summary["steps"], summary["beta"]) == (str(parent / "checkpoint"), 1, 0.02)
    assert summary["learning_rate"] == 5e-4
