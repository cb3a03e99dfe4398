"""The supervised recipe holds out: exact resumes, damage, faults, signals, changed settings, and its exit codes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from recipes import sft
from recipes.making.generation import POSITION_SCHEMA
from rookworld_trl.checkpointing.stopping import BAD_INPUT, DONE, PREEMPTED, UNRECOVERABLE
from rookworld_trl.chess.dataset import split_of
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.training.supervised import SupervisedConfig, SupervisedTrainer
from tests.recipes.conftest import positions
from tests.support.checkpoint_diff import IGNORED, differences

Runs = Callable[..., None]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The positions after two plies, as far as they belong to the training split."""
    folder = tmp_path_factory.mktemp("positions")
    records = [
        {"fen": board.fen(), "history": "", "moves": moves[:5], "cp": [5, 4, 3, 2, 1], "played": moves[0], "game": 0}
        for board in positions(0, 12)
        if (moves := [move.uci() for move in board.legal_moves]) and split_of(board.fen()) == "train"
    ]
    table = pa.Table.from_pylist(records, schema=POSITION_SCHEMA)
    pq.write_table(table, folder / "positions-00000.parquet")
    return folder


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Runs:
    """The recipe over a model of a few thousand parameters, with a checkpoint at every step; how it must end."""

    def start(code: int = DONE, **changes: Any) -> None:
        settings = {"positions": shards, "output_dir": tmp_path / "run"}
        settings |= {"n_layer": 1, "n_embd": 16, "n_head": 2, "max_steps": 4, "per_device_train_batch_size": 2}
        settings |= {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 3}
        settings |= {"save_steps": 1, "logging_steps": 3, "use_cpu": "true", "bf16": "false", "seed": 1}
        settings |= {"report_to": "none", "disable_tqdm": "true", "dataloader_pin_memory": "false"}
        words = [word for key, value in (settings | changes).items() for word in (f"--{key}", str(value))]
        if code in (DONE, PREEMPTED):
            assert sft.program(words) == code
            return
        with pytest.raises(SystemExit) as ended:
            sft.program(words)
        assert ended.value.code == code

    return start


def during_training(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[SupervisedTrainer], None]) -> None:
    """Call `act` at the beginning of a step (from 0)."""
    train = SupervisedTrainer.train

    def watched(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        trainer = self

        class Act(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == step:
                    act(trainer)

        self.add_callback(Act())
        return train(self, *args, **kwargs)

    monkeypatch.setattr(SupervisedTrainer, "train", watched)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        during_training(patch, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        run(PREEMPTED)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run()
    whole, resumed = tmp_path / "whole", tmp_path / "run"
    assert not differences(whole / "checkpoint-4", resumed / "checkpoint-4", ignore=(*IGNORED, "run_id"))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "training.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert not (resumed / "training_args.bin").exists()
    assert torch.equal(load_model(str(resumed)).lm_head.weight, load_model(str(whole)).lm_head.weight)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"mirror": "true"}, "`mirror` was False and is True"),
    ({"learning_rate": 1e-2}, "`rates` was"),
    ({"n_embd": 32}, "`n_embd` was 16 and is 32"),
]


def test_a_run_of_other_settings_goes_on_with_none_and_a_finished_one_is_left_alone(
    run: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was that decided what it learned."""
    run(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "build", None)
        run(max_steps=1)
    weights = (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_bytes()
    for changes, named in OTHERS:
        run(BAD_INPUT, max_steps=2, **changes)
        assert named in capsys.readouterr().err
        assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").read_bytes() == weights


def test_a_gradient_that_is_not_finite_is_never_applied_and_recovery_goes_back_at_half_the_rates(
    run: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []

    def poison(trainer: SupervisedTrainer) -> None:
        trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)

    def note(trainer: SupervisedTrainer) -> None:
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])

    def diverge(**changes: Any) -> None:
        with monkeypatch.context() as patch:
            during_training(patch, 3, poison)
            during_training(patch, 2, note)
            run(UNRECOVERABLE, lr_scheduler_type="constant", **changes)
        error = capsys.readouterr().err
        assert "training diverged at step 4" in error
        assert "if it comes again, with `--recovery_mode`" in error

    folder = tmp_path / "run"
    diverge()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    during_training(monkeypatch, 2, note)
    run(lr_scheduler_type="constant", recovery_mode="true")
    assert [path.name for path in folder.glob("superseded-*")] == ["superseded-checkpoint-3"]
    assert rates == [rates[0], [rate / 2 for rate in rates[0]]]
    run(lr_scheduler_type="constant")  # it is finished


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        *((name, True, "is True: rows go through a pass of their own") for name in ("packing", "padding_free")),
        ("activation_checkpointing", True, "is True: rows go through a pass of their own"),
        ("push_to_hub", True, r"is True: .* hf upload"),
        ("per_device_train_batch_size", 0, r"is 0: .+\. Set it to .+\.$"),
        ("learning_rate", -1.0, r"is -1.0: .+\. Set it to .+\.$"),
    ],
)
def test_what_supervised_training_does_not_do_is_refused(tmp_path: Path, name: str, value: float, found: str) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` {found}"):
        SupervisedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: value})
