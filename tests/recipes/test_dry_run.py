"""A dry run checks what a run would, says what it would take, and leaves nothing behind."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config

from rookworld_trl.plugins.dry_run import cards
from tests.recipes.conftest import run
from tests.recipes.test_sft_durable import run as run_sft  # noqa: F401
from tests.recipes.test_sft_durable import shards  # noqa: F401


def files_of(folder: Path) -> dict[Path, int]:
    """Everything below the folder, with the times of its last changes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_dry_run_leaves_nothing_behind(arguments, tmp_path, capsys):
    """Its figures are in the line of `--json`; no alert goes out."""
    before = files_of(tmp_path)
    changes = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2, "alert": f"touch {tmp_path}/told"}
    run(arguments | changes | {"dry_run": True, "max_steps": 30, "max_train_minutes": 1000})
    assert files_of(tmp_path) == before
    shown = capsys.readouterr().out
    assert re.search(
        r"dry run: 12 steps were made, nothing was written to .*/run\n  gates    all hold: dropout 0", shown
    )
    assert re.search(r"time .* minutes: .* for 30 steps, .* to measure\n", shown)
    assert re.search(
        r"disk     .* GB at most, with 3 checkpoints; .* are free\n  files    .*/run/: metrics.jsonl, ", shown
    )
    run(arguments | {"dry_run": True, "json": True, "max_steps": 300, "max_train_minutes": 0.01})
    found = json.loads(capsys.readouterr().out)
    assert (found["output_dir"], found["of"]) == (str(arguments["output_dir"]), 300)
    assert found["steps"] == int(0.6 / found["seconds_a_step"]) + 1
    assert found["train_minutes"] == pytest.approx(found["steps"] * found["seconds_a_step"] / 60)


def left(folder: Path) -> set[str]:
    """What lies in a run's folder, as a dry run names it."""
    return {re.sub(r"-\d+$", "-<step>", path.name) + "/" * path.is_dir() for path in folder.iterdir()}


@pytest.mark.slow
def test_what_a_run_leaves_is_what_its_dry_run_said(arguments, run_sft, tmp_path, capsys):  # noqa: F811
    """At most so many bytes: of the checkpoints that were made, and of one that is being written."""
    sft = tmp_path / "sft"
    words = arguments | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "json": True}
    for start, folder, model, kept in (
        (lambda **more: run(words | more), words["output_dir"], "checkpoint/model.safetensors", 1 + 1),
        (partial(run_sft, output_dir=sft, json=True), sft, "model.safetensors", 4 + 1),
    ):
        start(dry_run=True)
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        start()
        assert left(folder) == {*said["files"]} - {"health.jsonl"}
        model, optimizer = ((folder / name).stat().st_size for name in (model, "checkpoint-2/optimizer.pt"))
        others = sum(file.stat().st_size for file in (*folder.glob("*.parquet"), folder / "metrics.jsonl"))
        assert said["disk_gb"] * 1e9 == pytest.approx(model + kept * (model + optimizer) + others, rel=0.1)


@pytest.mark.slow
def test_a_dry_run_goes_on_where_the_run_would(arguments, capsys):
    """By the same rules: with another seed it would see other rows, which is refused."""
    run(arguments | {"save_strategy": "steps", "save_steps": 1})
    folder = arguments["output_dir"]
    before, resumed = files_of(folder), arguments | {"dry_run": True, "auto_resume": True, "max_steps": 5}
    run(resumed)
    assert "for 3 steps" in capsys.readouterr().out
    run(resumed | {"seed": 7}, code=2)
    assert "belongs to a run of another kind" in capsys.readouterr().err
    assert files_of(folder) == before


def test_what_fits_on_a_card_by_arithmetic():
    """RookWorld-LM in 640 rows of 234 tokens a step with bf16. 1e9 + 20 x 124,439,808 = 3.49e9 bytes are held. Sampling
    adds 640 x 234 x 2 x 12 x 768 x 2 = 5.52e9; learning 12 x 50,257 x 4,096 = 2.47e9, and a row 234 x 12 x 768 x 38 =
    81.9e6. Of 12 GB 10.2 may be filled: 51 rows, and 40 divide 640."""
    args = SimpleNamespace(bf16=True, fp16=False, beta=0.01, per_device_train_batch_size=32)
    args.gradient_accumulation_steps = args.steps_per_generation = 20
    assert list(cards(GPT2Config(), args, 124_439_808, 234)) == [
        "from  8 GB (RTX 4060): not: sampling 640 rows together takes 9.0 GB",
        "from 12 GB (RTX 4070): micro-batches of 40 rows",
        "from 16 GB (RTX 4060 Ti): micro-batches of 80 rows",
        "from 24 GB (RTX 4090): micro-batches of 160 rows",
        "from 40 GB (A100): micro-batches of 320 rows",
        "from 80 GB (H100): micro-batches of 640 rows",
    ]
    args.bf16 = False  # 1e9 + 2.49e9 + 11.0e9
    assert next(cards(GPT2Config(), args, 124_439_808, 234)).endswith("takes 14.5 GB")
