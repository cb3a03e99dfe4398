"""Where a run starts from, what may have changed since, and what happens to the checkpoints it leaves behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from rookworld_trl.checkpointing import identity, rescue, resume, store
from rookworld_trl.checkpointing.exits import BAD_INPUT, UNRECOVERABLE, reported
from rookworld_trl.checkpointing.resume import NothingToResumeError, ResumeError, choose_start
from tests.support.toy import make_trainer, policy, prompts, tokenizer

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, a checkpoint after each, the first two made stable; used by copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(folder, max_steps=3, stable_after_steps=1, lr_scheduler_type="constant").train()
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def test_without_recovery_checkpoints_become_stable_too(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=3, stable_after_steps=1, recovery=False).train()
    assert sorted(path.name for path in (tmp_path / "run").glob("stable-*")) == ["stable-1", "stable-2"]


def test_a_reference_that_follows_the_policy_is_resumed_as_it_was(tmp_path: Path) -> None:
    follows = {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
        "save_total_limit": None,
    }
    whole = make_trainer(tmp_path / "run", max_steps=4, **follows)
    whole.train()
    again = make_trainer(tmp_path / "run", max_steps=4, **follows)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, ours), theirs in zip(again.ref_model.named_parameters(), whole.ref_model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert again.state.log_history[-2]["kl"] == whole.state.log_history[-2]["kl"] > 0


def trainer_for(run: Path, **changes: Any) -> Any:
    return make_trainer(run, **{"max_steps": 3, "stable_after_steps": 1, "lr_scheduler_type": "constant", **changes})


ASKED = {"max_steps": 3, "num_train_epochs": 3.0, "seed": 42}


def start(run: Path, recipe: dict[str, Any] | None = None, **flags: Any) -> resume.Start:
    settings = {"resume_from_checkpoint": None, "auto_resume": False, "recovery_mode": False, **flags}
    args = SimpleNamespace(output_dir=str(run), process_index=0, **settings)
    args.to_dict = lambda: {**vars(args), **ASKED, "to_dict": None}
    return choose_start(args, recipe)


def damage(folder: Path, file: str = "optimizer.pt") -> None:
    with (folder / file).open("r+b") as opened:
        opened.truncate(10)


# Promotion


def test_checkpoints_become_stable_after_healthy_steps(finished_run: Path) -> None:
    names = sorted(path.name for path in finished_run.iterdir() if path.is_dir())
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "stable-1", "stable-2"]
    assert store.verify(finished_run / "stable-2", finite=True) == []


def test_an_unhealthy_step_delays_promotion(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-3"
    promoted: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "promote", lambda folder, limit: promoted.append(folder))
        for last_fault, expected in ((4, 0), (3, 1)):
            stable = store.StableCheckpoints(after=2, candidates=[checkpoint])
            stable.step_done(5, last_fault, write=True)
            assert len(promoted) == expected
            assert stable.candidates == []


def test_special_checkpoints(run: Path) -> None:
    """Written whole under names of their own, with what they were given, and not more than allowed."""
    trainer = trainer_for(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    for step in (6, 7, 8, 9):
        trainer.state.global_step = step
        extra = {"batch": [{"ids": torch.arange(3)}], "texts": ["a"], "where": Path("x"), "loss": float("nan")}
        folder = trainer.save_special("debug", extra)
        assert folder == run / f"debug-{step}"
        assert store.verify(folder) == []
    assert sorted(path.name for path in run.glob("debug-*")) == ["debug-7", "debug-8", "debug-9"]
    kept = json.loads((folder / "extra.json").read_text())
    assert (kept["texts"], kept["where"]) == (["a"], "x")
    assert load_file(folder / "extra.safetensors")["0"].tolist() == [0, 1, 2]
    trainer.save_special("recovery")
    assert start(run, auto_resume=True).checkpoint == run / "checkpoint-3"  # never from one of these


# Where to start


def test_auto_resume_starts_at_the_beginning_where_there_is_nothing(tmp_path: Path) -> None:
    found = start(tmp_path / "nowhere", auto_resume=True)
    assert (found.checkpoint, found.finished, found.asked["max_steps"]) == (None, False, 3)
    assert start(tmp_path, auto_resume=True).checkpoint is None


def test_without_a_flag_nothing_is_resumed(run: Path) -> None:
    assert start(run).checkpoint is None


def test_auto_resume_quarantines_what_does_not_verify(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(run / "checkpoint-3")
    (run / "checkpoint-2" / "model.safetensors").unlink()
    assert start(run, auto_resume=True).checkpoint == run / "stable-2"
    assert {path.name for path in run.glob("quarantined-*")} == {"quarantined-checkpoint-3", "quarantined-checkpoint-2"}
    assert "optimizer.pt has 10 bytes" in (run / "quarantined-checkpoint-3" / "reason.txt").read_text()
    assert "quarantined-checkpoint-3: optimizer.pt has 10 bytes" in caplog.text


def test_auto_resume_never_restarts_a_run_in_silence(run: Path) -> None:
    for folder in store.list_checkpoints(run):
        damage(folder)
    for _ in range(2):  # the second time there are only quarantined ones
        with pytest.raises(NothingToResumeError, match="holds no checkpoint that verifies"):
            start(run, auto_resume=True)


@pytest.fixture
def finished(run: Path) -> Path:
    """A folder whose run has come to its end, model included."""

    def save(folder: Path) -> None:
        policy().save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    rescue.write_model(save, run, main=True)
    resume.mark_finished(run, start(run, RECIPE, auto_resume=True), run / "checkpoint")
    return run


RECIPE = {"model": "nano", "leading_eos": False, "max_train_minutes": None, "eval_split": "dev"}


def test_auto_resume_of_a_finished_run(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert start(finished, RECIPE, auto_resume=True).finished
    assert start(finished, RECIPE | {"eval_split": "test"}, auto_resume=True).finished
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("change", [{"model": "other"}, {"leading_eos": True}])
def test_another_run_is_not_taken_for_the_finished_one(finished: Path, change: dict[str, Any]) -> None:
    (name,) = change
    found = rf"holds a finished run with other settings: `{name}` was .*Give this one another `output_dir`"
    with pytest.raises(ResumeError, match=found):
        start(finished, RECIPE | change, auto_resume=True)


def test_another_seed_is_not_taken_for_the_finished_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASKED, "seed", 43)
    with pytest.raises(ResumeError, match="`seed` was 42 and is 43"):
        start(finished, RECIPE, auto_resume=True)


def test_a_finished_run_that_is_asked_for_more_time_goes_on(finished: Path) -> None:
    found = start(finished, RECIPE | {"max_train_minutes": 3.0}, auto_resume=True)
    assert (found.finished, found.checkpoint) == (False, finished / "checkpoint-3")


@pytest.mark.parametrize("fault", ["gone", "cut", "no tokenizer"])
def test_a_finished_run_without_its_model_is_not_finished(
    finished: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "gone":
        shutil.rmtree(finished / "checkpoint")
    elif fault == "cut":
        damage(finished / "checkpoint", "model.safetensors")
    else:
        (finished / "checkpoint" / "tokenizer.json").unlink()
    found = start(finished, RECIPE, auto_resume=True)
    assert (found.finished, found.checkpoint) == (False, finished / "checkpoint-3")
    assert "holds a finished run, but of its model checkpoint/" in caplog.text


def test_a_named_checkpoint_has_to_verify(run: Path) -> None:
    assert start(run, resume_from_checkpoint=str(run / "checkpoint-2")).checkpoint == run / "checkpoint-2"
    damage(run / "checkpoint-3")
    with pytest.raises(ResumeError, match=r"optimizer\.pt has 10 bytes.*resume from .*checkpoint-2, which verifies"):
        start(run, resume_from_checkpoint=str(run / "checkpoint-3"))
    with pytest.raises(ResumeError, match="there is no such folder"):
        start(run, resume_from_checkpoint=str(run / "checkpoint-77"))


def test_recovery_mode_takes_the_last_stable_one(run: Path) -> None:
    assert start(run, recovery_mode=True).checkpoint == run / "stable-2"
    damage(run / "stable-2")
    assert start(run, recovery_mode=True).checkpoint == run / "stable-1"
    damage(run / "stable-1")
    with pytest.raises(ResumeError, match="holds none that verifies"):
        start(run, recovery_mode=True)


@pytest.mark.parametrize(("error", "code"), [(ResumeError("x"), BAD_INPUT), (NothingToResumeError("x"), UNRECOVERABLE)])
def test_exit_codes_of_errors(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, reported():
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: x\n"
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


# What may have changed


def test_a_changed_setting_is_refused_by_name(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    trainer = trainer_for(run, temperature=0.5, seed=7)
    with pytest.raises(ResumeError, match=r"`seed` was 42 and is 7; `temperature` was 1\.0 and is 0\.5.*Restore them"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("what", ["rows", "order", "reward", "model"])
def test_changed_data_rewards_and_model_are_refused(run: Path, what: str) -> None:
    changes: dict[str, Any] = {}
    if what == "rows":
        table = prompts(32).to_dict()
        table["task"][31] = "x"
        changes["data"] = Dataset.from_dict(table)
    elif what == "order":
        changes["data"] = prompts(32).select([1, 0, *range(2, 32)])
    elif what == "reward":
        changes["reward"] = other_reward
    trainer = trainer_for(run, **changes)
    if what == "model":
        with torch.no_grad():
            trainer.model.transformer.wte.weight[0, 0] += 1e-6
    field = {"rows": "train_dataset", "order": "train_dataset", "reward": "rewards", "model": "starting_weights"}[what]
    with pytest.raises(ResumeError, match=f"`{field}` was"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_admission_looks_and_touches_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run}
    trainer = trainer_for(run)
    trainer.admit(run / "checkpoint-2", {"leading_eos": False})
    with pytest.raises(ResumeError, match=r"`temperature` was 1\.0 and is 0\.5"):
        trainer_for(run, temperature=0.5).admit(run / "checkpoint-2", {})
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run} == before
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    again = trainer_for(run)
    with pytest.raises(ResumeError, match="`leading_eos` was False and is True"):
        again.admit(run / "checkpoint-3", {"leading_eos": True})


def other_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_a_new_learning_rate_is_applied_and_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(run, learning_rate=2e-2, logging_steps=1, save_steps=2)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2, 1e-2, 2e-2])
    assert "`learning_rate` was 0.01 and is 0.02 from here on" in caplog.text
    assert trainer.state.save_steps == 2
    again = trainer_for(run, learning_rate=2e-2, max_steps=4)
    again.train(resume_from_checkpoint=str(run / "checkpoint-3"))  # not applied a second time
    assert again.state.log_history[-2]["learning_rate"] == pytest.approx(2e-2)


def test_recovery_halves_the_rate_and_tightens_the_kl_for_good(run: Path) -> None:
    trainer = trainer_for(run, recovery_mode=True, kl_target=0.03)
    trainer.train(resume_from_checkpoint=str(run / "stable-2"))
    assert trainer.state.log_history[-2]["learning_rate"] == pytest.approx(5e-3)
    assert (trainer.kl.controller.beta, trainer.kl.controller.target) == pytest.approx((0.02, 0.015))
    assert not (run / "superseded-stable-1").exists()
    assert (run / "superseded-checkpoint-3").exists()  # the course that was given up
    later = trainer_for(run, max_steps=4)  # `--auto_resume`, without the flag
    later.train(resume_from_checkpoint=True)
    assert later.state.log_history[-2]["learning_rate"] == pytest.approx(5e-3)
    assert (later.kl.controller.beta, later.kl.controller.target) == pytest.approx((0.02, 0.015))
    assert later.identity.recoveries == 1


@pytest.mark.slow
def test_a_second_recovery_does_not_repeat_the_first(run: Path) -> None:
    """From the same checkpoint or an older one, whatever the first left on the disk."""
    settings = {"recovery_mode": True, "kl_target": 0.03, "save_strategy": "no"}
    for attempt, stable in ((1, "stable-2"), (2, "stable-2"), (3, "stable-1")):
        trainer = trainer_for(run, **settings)
        trainer.train(resume_from_checkpoint=str(run / stable))
        assert trainer.identity.recoveries == attempt
        assert trainer.state.log_history[-2]["learning_rate"] == pytest.approx(1e-2 / 2**attempt)
        strict = (trainer.kl.controller.beta, trainer.kl.controller.target)
        assert strict == pytest.approx((0.01 * 2**attempt, 0.03 / 2**attempt))
    other = trainer_for(run, max_steps=2, save_steps=1, stable_after_steps=1, save_strategy="steps")
    other.train()
    new = trainer_for(run, **settings)
    new.train(resume_from_checkpoint=str(run / "stable-1"))
    assert new.identity.recoveries == 1  # another run's attempts are not its own


def test_identity_outlives_restarts_and_a_new_run_gets_a_new_one(run: Path) -> None:
    first = identity.RunIdentity.from_state(json.loads((run / "checkpoint-2" / "run.json").read_text()))
    trainer = trainer_for(run)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.identity.run_id, trainer.identity.started) == (first.run_id, first.started)
    new = trainer_for(run, max_steps=1, save_strategy="no")
    new.train()
    assert new.identity.run_id != first.run_id
    assert store.list_checkpoints(run) == []  # nothing that the new run's `--auto_resume` could mistake for its own
    assert len(list(run.glob("superseded-*"))) == 5


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
    with identity.RunIdentity(run_id="abc").tracked():
        assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("abc", "must")
    assert "WANDB_RUN_ID" not in os.environ
    assert os.environ["WANDB_RESUME"] == "must"


# The fingerprint's parts


def test_dataset_digests_go_by_rows_not_by_layout() -> None:
    def digests(dataset: Any) -> Any:
        return identity.dataset_digests(dataset, ordered=False)

    plain = prompts(5)
    assert digests(plain) == digests(prompts(8).select([0, 1, 2, 3, 4]))
    assert digests(plain) == digests(plain.flatten_indices())
    assert digests(plain) != digests(prompts(6))
    assert digests(plain) != digests(plain.rename_column("task", "kind"))
    assert digests(iter([1])) is None


@pytest.mark.parametrize(("ordered", "rows", "same"), [(True, 9, True), (True, 3, True), (False, 9, False)])
def test_rows_in_order_may_become_more_or_fewer(ordered: bool, rows: int, same: bool) -> None:
    before, now = (identity.dataset_digests(prompts(n), ordered) for n in (5, rows))
    changes = identity.compare({"train_dataset": before}, {"train_dataset": now})
    assert (list(changes.conflicts) == []) == same
    assert not changes.applied


def test_other_rows_are_another_run() -> None:
    before, now = (identity.dataset_digests(prompts(12).select(range(k, k + 6)), ordered=True) for k in (0, 1))
    assert list(identity.compare({"train_dataset": before}, {"train_dataset": now}).conflicts) == ["train_dataset"]


def test_weights_digest_sees_one_bit() -> None:
    one, two = policy(), policy()
    assert identity.weights_digest(one.state_dict()) == identity.weights_digest(two.state_dict())
    with torch.no_grad():
        two.transformer.wpe.weight[3, 3] *= 1 + 2**-23
    assert identity.weights_digest(one.state_dict()) != identity.weights_digest(two.state_dict())


def test_tokenizers_digest_sees_what_changes_tokens() -> None:
    def digest(made: Any) -> str | None:
        return identity.tokenizer_digest(made)

    padded, eos_first = tokenizer(), tokenizer()
    padded(["a", "abc"], padding=True)
    eos_first.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    other_pad = tokenizer()
    other_pad.pad_token = "<eos>"
    assert digest(padded) == digest(tokenizer()) != digest(eos_first)
    assert digest(other_pad) != digest(tokenizer())
    assert digest(None) is None


def test_a_name_may_change_where_its_content_does_not() -> None:
    rows = [identity.dataset_digests(prompts(n), ordered=True) for n in (5, 9)]
    before = {"dataset": "a.csv", "model": "nano", "train_dataset": rows[0], "starting_weights": "1"}
    now = {"dataset": "b.csv", "model": "copy", "train_dataset": rows[1], "starting_weights": "1"}
    assert not identity.compare(before, now).conflicts
    assert list(identity.compare(before, now | {"starting_weights": "2"}).conflicts) == ["model", "starting_weights"]
    unknown = {"train_dataset": None, "starting_weights": None}  # a stream, a model in shards
    assert list(identity.compare(before | unknown, now | unknown).conflicts) == ["dataset", "model"]


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        ("reverse", "policy_to_reference", True),
        ("forward", "reference_to_policy", True),
        ("forward", "policy_to_reference", False),
        ("reverse", "symmetric", False),
    ],
)
def test_checkpoints_with_the_old_names_of_a_setting_go_on(then: str, now: str, same: bool) -> None:
    """Version 0.1 called KL(pi || ref) reverse."""
    assert (not identity.compare({"kl_type": then}, {"kl_type": now}).conflicts) == same


def test_changes_are_sorted_by_what_they_do() -> None:
    before = {"seed": 1, "learning_rate": 1.0, "logging_steps": 1, "gone": 3}
    now = {"seed": 2, "learning_rate": 2.0, "logging_steps": 5, "new": 4}
    changes = identity.compare(before, now)
    assert changes.conflicts == {"seed": (1, 2)}
    assert changes.applied == {"learning_rate": (1.0, 2.0), "gone": (3, None), "new": (None, 4)}


def test_a_learning_rate_of_zero_can_be_resumed_and_never_be_raised(tmp_path: Path) -> None:
    """Schedules are scaled when the rate changes, and nothing that is multiplied makes a rate of zeros."""
    options: dict[str, Any] = {"learning_rate": 0.0, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path, max_steps=1, **options).train()
    again = make_trainer(tmp_path, max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    with pytest.raises(ResumeError, match=r"`learning_rate` was 0 and is 0.01: .* start a new run"):
        make_trainer(tmp_path, max_steps=3, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
