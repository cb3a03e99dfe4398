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

from rookworld_trl.checkpointing import resume, store
from rookworld_trl.checkpointing.resume import NothingToResumeError, ResumeError, choose_start
from rookworld_trl.checkpointing.stopping import BAD_INPUT, UNRECOVERABLE, reported
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
    """Written whole under names of their own, with what they were given, not more than allowed, never resumed from."""
    trainer = trainer_for(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    extra = {"batch": [{"ids": torch.arange(3)}], "texts": ["a"], "where": Path("x"), "loss": float("nan")}
    for step in (6, 7, 8, 9):
        trainer.state.global_step = step
        assert trainer.save_special("debug", extra) == run / f"debug-{step}"
    assert sorted(path.name for path in run.glob("debug-*")) == ["debug-7", "debug-8", "debug-9"]
    assert store.verify(run / "debug-9") == []
    kept = json.loads((run / "debug-9" / "extra.json").read_text())
    assert (kept["texts"], kept["where"]) == (["a"], "x")
    assert load_file(run / "debug-9" / "extra.safetensors")["0"].tolist() == [0, 1, 2]
    assert start(run, auto_resume=True).checkpoint == run / "checkpoint-3"


# Where to start


def test_where_a_run_starts_while_its_checkpoints_decay(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = start(run / "nowhere", auto_resume=True)
    assert (found.checkpoint, found.finished, found.asked["max_steps"]) == (None, False, 3)
    assert start(run).checkpoint is None
    assert start(run, resume_from_checkpoint=str(run / "checkpoint-2")).checkpoint == run / "checkpoint-2"
    with pytest.raises(ResumeError, match="there is no such folder"):
        start(run, resume_from_checkpoint=str(run / "checkpoint-77"))
    damage(run / "checkpoint-3")
    with pytest.raises(ResumeError, match=r"optimizer\.pt has 10 bytes.*resume from .*checkpoint-2, which verifies"):
        start(run, resume_from_checkpoint=str(run / "checkpoint-3"))
    (run / "checkpoint-2" / "model.safetensors").unlink()
    assert start(run, auto_resume=True).checkpoint == run / "stable-2"
    assert {path.name for path in run.glob("quarantined-*")} == {"quarantined-checkpoint-3", "quarantined-checkpoint-2"}
    assert "optimizer.pt has 10 bytes" in (run / "quarantined-checkpoint-3" / "reason.txt").read_text()
    assert "quarantined-checkpoint-3: optimizer.pt has 10 bytes" in caplog.text
    assert start(run, recovery_mode=True).checkpoint == run / "stable-2"
    damage(run / "stable-2")
    assert start(run, recovery_mode=True).checkpoint == run / "stable-1"
    for folder in store.list_checkpoints(run):
        damage(folder)
    with pytest.raises(ResumeError, match="holds none that verifies"):
        start(run, recovery_mode=True)
    for _ in range(2):  # never from the beginning in silence; the second time there are only quarantined ones
        with pytest.raises(NothingToResumeError, match="holds no checkpoint that verifies"):
            start(run, auto_resume=True)


@pytest.fixture
def finished(run: Path) -> Path:
    """A folder whose run has come to its end, model included."""
    trainer_for(run).write_model()
    resume.mark_finished(run, start(run, RECIPE, auto_resume=True), run / "checkpoint")
    return run


RECIPE = {"model": "nano", "leading_eos": False, "max_train_minutes": None, "eval_split": "dev"}


def test_a_finished_run_that_is_asked_for_something_else(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same is done already and nothing is touched, another run is refused, more of the same goes on, and what else
    has changed is said."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert start(finished, RECIPE, auto_resume=True).finished
    assert start(finished, RECIPE | {"eval_split": "test"}, auto_resume=True).finished
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    for name, value in {"model": "other", "leading_eos": True}.items():
        found = rf"holds a finished run with other settings: `{name}` was .*Give this one another `output_dir`"
        with pytest.raises(ResumeError, match=found):
            start(finished, RECIPE | {name: value}, auto_resume=True)
    more = start(finished, RECIPE | {"max_train_minutes": 3.0}, auto_resume=True)
    assert (more.finished, more.checkpoint) == (False, finished / "checkpoint-3")
    monkeypatch.setitem(ASKED, "seed", 43)
    assert start(finished, RECIPE, auto_resume=True).finished
    assert "nothing to do, whatever else has changed (`seed` was 42 and is 43)" in caplog.text


def test_a_finished_run_without_its_model_is_not_finished(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = finished / "checkpoint"
    for fault in (
        (model / "tokenizer.json").unlink,
        lambda: damage(model, "model.safetensors"),
        lambda: shutil.rmtree(model),
    ):
        fault()
        caplog.clear()
        found = start(finished, RECIPE, auto_resume=True)
        assert (found.finished, found.checkpoint) == (False, finished / "checkpoint-3")
        assert "holds a finished run, but of its model checkpoint/" in caplog.text


def test_exit_codes_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((ResumeError("x"), BAD_INPUT), (NothingToResumeError("x"), UNRECOVERABLE)):
        with pytest.raises(SystemExit) as caught, reported():
            raise error
        assert caught.value.code == code
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


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            lambda: {"kl_type": "symmetric", "kl_estimator": "k1", "seed": 7},
            r"`kl_estimator` was 'k3' and is 'k1'; `kl_type` was 'policy_to_reference' and is 'symmetric'\. Restore",
        ),
        (lambda: {"data": other_rows()}, "`train_dataset` was"),
        (lambda: {"data": prompts(32).select([1, 0, *range(2, 32)])}, "`train_dataset` was"),
        (lambda: {"reward": other_reward}, "`rewards` was"),
        (dict, "`starting_weights` was"),
        # A checkpoint may stand in the middle of a cycle of sampling, whose batches it holds.
        (
            lambda: {"per_device_train_batch_size": 2, "steps_per_generation": 2},
            r"`batches` was \[4, 2, 1\] and is \[2, 2, 2\]",
        ),
    ],
    ids=["settings", "rows", "order", "reward", "model", "batches"],
)
def test_what_makes_it_another_run_is_refused_by_name(run: Path, changes: Callable[[], Any], found: str) -> None:
    before = {path.name for path in run.iterdir()}
    trainer = trainer_for(run, **changes())
    if changes is dict:
        nudge(trainer)
    with pytest.raises(ResumeError, match=found):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert {path.name for path in run.iterdir()} == before


def test_admission_looks_and_touches_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run}
    trainer = trainer_for(run)
    trainer.admit(run / "checkpoint-2", {"leading_eos": False})
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run} == before
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    with pytest.raises(ResumeError, match="`leading_eos` was False and is True"):
        trainer_for(run).admit(run / "checkpoint-3", {"leading_eos": True})


def test_a_new_learning_rate_is_applied_and_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(run, learning_rate=2e-2, logging_steps=1, save_steps=2)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2, 1e-2, 2e-2])
    assert "other settings from here on: `learning_rate` was 0.01 and is 0.02; `save_steps` was 1" in caplog.text
    assert trainer.state.save_steps == 2
    again = trainer_for(run, learning_rate=2e-2, max_steps=4)
    again.train(resume_from_checkpoint=str(run / "checkpoint-3"))  # not applied a second time
    assert again.state.log_history[-2]["learning_rate"] == pytest.approx(2e-2)


def test_each_recovery_halves_the_rate_and_tightens_the_kl_for_good(run: Path) -> None:
    """From the same checkpoint or an older one, whatever the last one left on the disk."""

    def in_force(trainer: Any) -> tuple[float, float, float]:
        controller = trainer.kl.controller
        return trainer.state.log_history[-2]["learning_rate"], controller.beta, controller.target

    for attempt, stable in ((1, "stable-2"), (2, "stable-1")):
        trainer = trainer_for(run, recovery_mode=True, kl_target=0.03)
        trainer.train(resume_from_checkpoint=str(run / stable))
        assert trainer.identity.recoveries == attempt
        assert in_force(trainer) == pytest.approx((1e-2 / 2**attempt, 0.01 * 2**attempt, 0.03 / 2**attempt))
    assert (run / "stable-1").exists()
    assert (run / "superseded-checkpoint-3").exists()  # the course that was given up
    later = trainer_for(run, max_steps=4)  # `--auto_resume`, without the flag
    later.train(resume_from_checkpoint=True)
    assert in_force(later) == pytest.approx((2.5e-3, 0.04, 0.0075))
    assert later.identity.recoveries == 2
    trainer_for(run, max_steps=2).train()
    new = trainer_for(run, recovery_mode=True)
    new.train(resume_from_checkpoint=str(run / "stable-1"))
    assert new.identity.recoveries == 1  # another run's attempts are not its own


def test_identity_outlives_restarts_and_a_new_run_gets_a_new_one(run: Path) -> None:
    first = json.loads((run / "checkpoint-2" / "run.json").read_text())
    trainer = trainer_for(run)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.identity.run_id, trainer.identity.started) == (first["run_id"], first["started"])
    new = trainer_for(run, max_steps=1, save_strategy="no")
    new.train()
    assert new.identity.run_id != first["run_id"]
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
        applied, conflicts = resume.compare(*digests)
        assert not applied
        return not conflicts

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


def test_a_name_may_change_where_its_content_does_not() -> None:
    rows = [resume.dataset_digests(prompts(n), ordered=True) for n in (5, 9)]
    before = {"dataset": "a.csv", "model": "nano", "train_dataset": rows[0], "starting_weights": "1"}
    now = {"dataset": "b.csv", "model": "copy", "train_dataset": rows[1], "starting_weights": "1"}
    assert not resume.compare(before, now)[1]
    assert list(resume.compare(before, now | {"starting_weights": "2"})[1]) == ["model", "starting_weights"]
    unknown = {"train_dataset": None, "starting_weights": None}  # a stream, a model in shards
    assert list(resume.compare(before | unknown, now | unknown)[1]) == ["dataset", "model"]


def test_changes_are_sorted_by_what_they_do() -> None:
    """Our own decide, but for a few; TRL's do not, nor those of another version."""
    before = {"kl_type": 1, "seed": 1, "eval_split": "dev", "recovery_max_attempts": 1, "same": 1, "gone": 3}
    now = {"kl_type": 2, "seed": 2, "eval_split": "test", "recovery_max_attempts": 2, "same": 1, "new": 4}
    applied, conflicts = resume.compare(before, now)
    assert conflicts == {"kl_type": (1, 2)}
    assert applied.keys() == {"seed", "eval_split", "recovery_max_attempts", "gone", "new"}
    assert resume.spelled({"seed": (1, 2), "new": (None, "a")}) == "`seed` was 1 and is 2; `new` was None and is 'a'"


def test_how_a_program_is_started_is_no_part_of_the_run(tmp_path: Path) -> None:
    args = make_trainer(tmp_path, auto_resume=True, alert="a secret").args
    kept = resume.settings(args, {"quiet": True, "model": "nano"})
    assert not {"auto_resume", "alert", "quiet", "output_dir", "run_name"} & kept.keys()
    assert (kept["model"], kept["max_steps"]) == ("nano", 4)


def test_a_learning_rate_of_zero_is_never_raised(tmp_path: Path) -> None:
    """Schedules are scaled when the rate changes, and nothing that is multiplied makes a rate of zeros."""
    make_trainer(tmp_path, max_steps=1, learning_rate=0.0).train()
    make_trainer(tmp_path, max_steps=2, learning_rate=0.0).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match=r"`learning_rate` was 0\.0 and is 0\.01"):
        make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
