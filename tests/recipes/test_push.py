"""`push_to_hub` from the recipe: checkpoint and card arrive, and what arrives says what was trained."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from rookworld_trl.checkpointing.resume import FINISHED_FILE
from tests.recipes.conftest import run, summary_of
from tests.support.hub import TOKEN, Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def pushing(arguments, rewarded):
    return arguments | {"push_to_hub": True, "hub_model_id": "me/trained", "hub_token": TOKEN}


def test_the_commit_of_a_model_of_the_hub_is_kept(hub: Hub, pushing: dict, tiny_checkpoint: Path) -> None:
    """What `main` stood for when the run began; a run that goes on knows it from its own checkpoint."""
    commit = hub.add("owner/start", tiny_checkpoint).sha("main")
    saving = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": False, "max_steps": 1}
    run(pushing | saving | {"model": "owner/start", "model_revision": "main"})
    folder = pushing["output_dir"]
    summary = summary_of(pushing)
    kept = json.loads((folder / "checkpoint-1" / "run.json").read_text())
    assert summary["model_commit"] == kept["fingerprint"]["model_commit"] == commit
    assert f"- start: `owner/start` at main, commit {commit}\n" in (folder / "checkpoint" / "README.md").read_text()
    resume = {"resume_from_checkpoint": folder / "checkpoint-1", "max_steps": 2}
    run(pushing | saving | resume | {"model": tiny_checkpoint})  # the same weights, from a folder
    assert summary_of(pushing)["steps"] == 2


@pytest.mark.parametrize(
    ("broken", "error", "code", "lost"),
    [
        ("document.write_report", ValueError("no such template"), 1, {"report.html"}),
        # The next `auto_resume` makes up for it.
        ("summary.write_atomically", OSError(28, "No space left on device"), 4, {"summary.json", FINISHED_FILE}),
    ],
)
def test_a_last_step_that_fails_costs_nothing_but_itself(
    pushing: dict, hub: Hub, monkeypatch, capsys, broken: str, error: Exception, code: int, lost: set[str]
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"rookworld_trl.reports.{broken}", fails)
    run(pushing, code=code)
    shown = capsys.readouterr()
    assert f"error: {max(lost)}: {error}" in shown.err
    assert ("Traceback" in shown.err) == (code == 1)
    names = {path.name for path in pushing["output_dir"].iterdir()}
    assert {"checkpoint", "metrics.jsonl", "report.html", "summary.json", FINISHED_FILE} - names == lost
    assert max(lost) not in shown.out
    assert "model.safetensors" in hub.repositories["me/trained"].branches["main"]


def test_a_token_that_may_not_write_is_refused_before_anything_trains(hub: Hub, pushing: dict, capsys) -> None:
    run(pushing | {"hub_token": "hf_read"}, code=2)
    error = capsys.readouterr().err
    assert "error: pushing to me/trained failed" in error
    assert "`hf auth login`" in error
    assert not (pushing["output_dir"] / "summary.json").exists()
