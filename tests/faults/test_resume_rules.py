"""Where a run starts from, what may have changed since, and what happens to the checkpoints it leaves behind."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from rookworld_trl.checkpointing import resume, store
from rookworld_trl.checkpointing.resume import ResumeError, choose_start
from rookworld_trl.checkpointing.stopping import BAD_INPUT, reported
from tests.support.toy import make_trainer, policy, prompts, tokenizer


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, a checkpoint after each; used by copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(folder, max_steps=3, lr_scheduler_type="constant").train()
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def trainer_for(run: Path, **changes: Any) -> Any:
    return make_trainer(run, **{"max_steps": 3, "lr_scheduler_type": "constant", **changes})


ASKED = {"max_steps": 3, "num_train_epochs": 3.0, "seed": 42}


def start(run: Path, recipe: dict[str, Any] | None = None, **flags: Any) -> resume.Start:
    settings = {"resume_from_checkpoint": None, "auto_resume": False, "recovery_mode": False, **flags}
    args = SimpleNamespace(output_dir=str(run), process_index=0, **settings)
    args.to_dict = lambda: {**vars(args), **ASKED, "to_dict": None}
    return choose_start(args, recipe)


def damage(folder: Path, file: str = "optimizer.pt") -> None:
    with (folder / file).open("r+b") as opened:
        opened.truncate(10)


# Where to start


def test_where_a_run_starts_while_its_checkpoints_decay(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = start(run / "nowhere", auto_resume=True)
    assert (found.checkpoint, found.finished, found.asked["max_steps"]) == (None, False, 3)
    assert start(run).checkpoint is None
    assert start(run, resume_from_checkpoint=str(run / "checkpoint-2")).checkpoint == run / "checkpoint-2"
    assert start(run, recovery_mode=True).checkpoint == run / "checkpoint-2"
    with pytest.raises(ResumeError, match="there is no such folder"):
        start(run, resume_from_checkpoint=str(run / "checkpoint-77"))
    damage(run / "checkpoint-3")
    with pytest.raises(ResumeError, match=r"optimizer\.pt has 10 bytes.*resume from .*checkpoint-2, which verifies"):
        start(run, resume_from_checkpoint=str(run / "checkpoint-3"))
    assert start(run, auto_resume=True).checkpoint == run / "checkpoint-2"
    assert "checkpoint-3 is not resumed from: optimizer.pt has 10 bytes" in caplog.text
    assert start(run, recovery_mode=True).checkpoint == run / "checkpoint-1"
    damage(run / "checkpoint-2")
    with pytest.raises(ResumeError, match="holds no two that verify"):
        start(run, recovery_mode=True)
    damage(run / "checkpoint-1")
    with pytest.raises(ResumeError, match="holds no checkpoint that verifies"):  # never the beginning in silence
        start(run, auto_resume=True)


def test_a_finished_run_that_is_asked_for_something_else(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same is done already and nothing is touched, more of the same goes on, and what else has changed is said."""
    recipe = {"model": "nano", "max_train_minutes": None}
    resume.mark_finished(run, start(run, recipe))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert start(run, recipe, auto_resume=True).finished
    assert start(run, recipe | {"model": "other"}, auto_resume=True).finished
    assert "nothing to do, whatever else has changed (`model` was 'nano' and is 'other')" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    more = start(run, recipe | {"max_train_minutes": 3.0}, auto_resume=True)
    assert (more.finished, more.checkpoint) == (False, run / "checkpoint-3")


def test_exit_codes_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, reported():
        raise ResumeError("x")
    assert caught.value.code == BAD_INPUT
    assert capsys.readouterr().err == "error: x\n"
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


# What may have changed


def other_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def other_rows() -> Dataset:
    table = prompts(32).to_dict()
    table["task"][31] = "x"
    return Dataset.from_dict(table)


def nudge(trainer: Any) -> None:
    with torch.no_grad():
        trainer.model.transformer.wte.weight[0, 0] += 1e-6


def test_what_makes_it_another_run_is_refused_by_name(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    for changes, found in (
        ({"data": other_rows()}, "`train_dataset` was"),
        ({"data": prompts(32).select([1, 0, *range(2, 32)])}, "`train_dataset` was"),
        ({"reward": other_reward}, "`rewards` was"),
        ({}, "`starting_weights` was"),
        # A checkpoint may stand in the middle of a cycle of sampling, whose batches it holds.
        ({"per_device_train_batch_size": 2, "steps_per_generation": 2}, r"`batches` was \[4, 2, 1\] and is \[2, 2, 2"),
    ):
        trainer = trainer_for(run, **changes)
        if not changes:
            nudge(trainer)
        with pytest.raises(ResumeError, match=found):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        assert {path.name for path in run.iterdir()} == before


def test_settings_that_change_are_applied_and_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(run, learning_rate=2e-2, logging_steps=1, save_steps=2, kl_type="symmetric")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2, 1e-2, 2e-2])
    assert "from here on: `kl_type` was 'policy_to_reference' and is 'symmetric'; `learning_rate` was 0" in caplog.text
    assert trainer.state.save_steps == 2
    again = trainer_for(run, learning_rate=2e-2, max_steps=4)
    again.train(resume_from_checkpoint=str(run / "checkpoint-3"))  # not applied a second time
    assert again.state.log_history[-2]["learning_rate"] == pytest.approx(2e-2)


def test_recovery_halves_the_rate_and_doubles_the_penalty_for_good(run: Path) -> None:
    trainer = trainer_for(run, recovery_mode=True)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert (run / "superseded-checkpoint-3").exists()  # the course that was given up
    later = trainer_for(run, max_steps=4)  # `--auto_resume`, without the flag
    later.train(resume_from_checkpoint=True)
    for each in (trainer, later):
        assert each.state.log_history[-2]["learning_rate"] == pytest.approx(5e-3)
        assert each.kl.controller.beta == pytest.approx(0.02)


def test_identity_outlives_restarts_and_a_new_run_gets_a_new_one(run: Path) -> None:
    first = json.loads((run / "checkpoint-2" / "run.json").read_text())
    trainer = trainer_for(run)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.identity.run_id, trainer.identity.started) == (first["run_id"], first["started"])
    new = trainer_for(run, max_steps=1, save_strategy="no")
    new.train()
    assert new.identity.run_id != first["run_id"]
    assert store.list_checkpoints(run) == []  # nothing that the new run's `--auto_resume` could mistake for its own
    assert len(list(run.glob("superseded-*"))) == 3


def test_weights_of_another_model_are_refused(run: Path) -> None:
    """transformers loads what fits and warns."""
    folder = run / "checkpoint-2"
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.ln_f.weight"]
    weights["stranger"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    store.commit(folder.rename(run / "staged"), folder)
    with pytest.raises(ResumeError, match=r"missing \['transformer\.ln_f\.weight'\], unexpected \['stranger'\]"):
        trainer_for(run).train(resume_from_checkpoint=str(folder))


def test_one_curve_in_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_RESUME", "must")
    with resume.RunIdentity(run_id="abc").tracked():
        assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("abc", "must")
    assert "WANDB_RUN_ID" not in os.environ
    assert os.environ["WANDB_RESUME"] == "must"


# The fingerprint's parts


def test_datasets_digests_go_by_rows_not_by_layout() -> None:
    def digests(dataset: Any) -> Any:
        return resume.dataset_digests(dataset, ordered=False)

    plain = prompts(5)
    assert digests(plain) == digests(prompts(8).select([0, 1, 2, 3, 4])) == digests(plain.flatten_indices())
    assert digests(plain) != digests(prompts(6))
    assert digests(plain) != digests(plain.rename_column("task", "kind"))
    assert digests(iter([1])) is None


def test_rows_in_order_may_become_more_or_fewer_and_no_others() -> None:
    def same(before: Dataset, now: Dataset, ordered: bool) -> bool:
        digests = [{"train_dataset": resume.dataset_digests(rows, ordered)} for rows in (before, now)]
        return resume.compare(*digests) == ({}, {})

    assert same(prompts(5), prompts(9), ordered=True)
    assert same(prompts(5), prompts(3), ordered=True)
    assert not same(prompts(5), prompts(9), ordered=False)
    assert not same(prompts(6), prompts(7).select(range(1, 7)), ordered=True)


def test_digests_of_weights_and_tokenizers_see_what_changes_them() -> None:
    one, two = policy(), policy()
    assert resume.weights_digest(one.state_dict()) == resume.weights_digest(two.state_dict())
    with torch.no_grad():
        two.transformer.wpe.weight[3, 3] *= 1 + 2**-23  # one bit
    assert resume.weights_digest(one.state_dict()) != resume.weights_digest(two.state_dict())
    padded, eos_first, other_pad = tokenizer(), tokenizer(), tokenizer()
    padded(["a", "abc"], padding=True)
    eos_first.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    other_pad.pad_token = "<eos>"
    digests = [resume.tokenizer_digest(made) for made in (tokenizer(), padded, eos_first, other_pad, None)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert digests[4] is None


def test_how_a_program_is_started_is_no_part_of_the_run(tmp_path: Path) -> None:
    args = make_trainer(tmp_path, auto_resume=True, alert="a secret").args
    kept = resume.settings(args, {"quiet": True, "model": "nano"})
    assert not {"auto_resume", "alert", "quiet", "output_dir", "run_name"} & kept.keys()
    assert (kept["model"], kept["max_steps"]) == ("nano", 4)
