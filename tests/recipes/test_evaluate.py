"""recipes/evaluate.py whole: every suite twice gives the same items, models side by side, a baseline compared."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recipes import evaluate as recipe
from rookworld_trl.chess import position_key
from rookworld_trl.chess.dataset import SHIPPED_DIRECTORY, load_shipped
from rookworld_trl.chess.seen import shown_positions, unseen

SUITES = ("held_out", "mate_in_one", "ladder")
EPD = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq -"
SHOWN = ["mine.epd", "mate in one", "ladder"]


def options(words: list[str]) -> recipe.EvaluationOptions:
    return recipe.parse((recipe.EvaluationOptions,), words)[0]


def few_rows(folder: Path, split: str = "dev", rows: int = 60) -> Path:
    """The first rows of a shipped split, in a folder as `load_shipped` reads it: to make all of them takes seconds."""
    pq.write_table(pq.read_table(SHIPPED_DIRECTORY / f"{split}.parquet").slice(0, rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def everything(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All suites, small; without Stockfish."""
    monkeypatch.setenv("STOCKFISH_PATH", "/no/engine")
    rows = load_shipped("dev", few_rows(tmp_path))
    monkeypatch.setattr(recipe, "load_shipped", lambda split: rows)
    monkeypatch.setattr(recipe, "run_ladder", partial(recipe.run_ladder, max_plies=8))
    (tmp_path / "mine.epd").write_text(f"{EPD} bm e4;\n{EPD} am f3;\n")
    options = ["--dataset", str(tmp_path / "mine.epd"), "--trained_on", "--games", "2", "--limit", "2"]
    return ["--model", str(tiny_checkpoint), *options, "--max_new_tokens", "3", "--suite", *SUITES]


def of(path: Path, number: int = 0) -> dict[str, Any]:
    return json.loads(path.read_text())["models"][number]


@pytest.mark.slow
def test_every_suite_is_reproducible_and_compared(
    everything: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a" / "first.json", tmp_path / "second.json"
    recipe.main([*everything, "--output", str(first)])
    recipe.main([*everything, "--output", str(second), "--baseline", str(first)])
    before, after = of(first), of(second)
    written = json.loads(first.read_text())
    assert (written["data"]["rows"], len(written["data"]["sha256"])) == (4, 64)
    assert "torch" in written["versions"]
    comparison, groups = after.pop("comparison"), after.pop("groups")
    assert before == after
    assert list(dict.fromkeys(each["name"] for each in before["results"])) == ["policy", "environment", *SHOWN]
    modes = [each["mode"] for each in before["results"]]
    assert modes == ["greedy", "sampled"] * 4 + ["greedy"], "games against players are greedy alone"
    assert {row["task"] for row in comparison} == {"policy", "environment", *SHOWN}
    assert {row["difference"] for row in comparison} <= {0.0, None}
    assert {row["task"] for row in groups} == {"policy", "environment", *SHOWN}, "and by how games ended, if alike"
    table = first.with_suffix(".md").read_text()
    assert table == second.with_suffix(".md").read_text()
    for line in ("| P: policy | skill | greedy |", "| mate in one | solved | sampled |", "| ladder | Elo, strict"):
        assert line in table
    assert "random legal" in table
    assert "input copied" in table
    assert "no Stockfish here" in capsys.readouterr().out


def test_models_stand_side_by_side_and_the_others_are_compared_with_the_first(
    everything: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.symlink_to(tiny_checkpoint)
    output = tmp_path / "both.json"
    models = ["--model", str(tiny_checkpoint), str(other)]
    wanted = ["--suite", "mate_in_one", "ladder", "--mode", "greedy", "--output", str(output)]
    recipe.main([*everything[2:], *models, *wanted])
    assert [of(output, n)["name"] for n in (0, 1)] == ["tiny-checkpoint", "other"]
    head = "| suite | metric | decoding | tiny-checkpoint | other | trivial players |"
    assert output.with_suffix(".md").read_text().startswith(head)
    assert "comparison" not in of(output)
    rows = of(output, 1)["comparison"]
    assert {row["task"] for row in rows} == {"mine.epd", "mate in one", "ladder"}
    assert {row["difference"] for row in rows if row["difference"] is not None} == {0.0}, "it is the same model"
    assert f"{tiny_checkpoint} -> {other}" in capsys.readouterr().out


def items_of(written: dict[str, Any]) -> list[Any]:
    return [item for result in written["models"][0]["results"] for item in result["items"]]


@pytest.mark.slow
def test_rows_that_were_trained_on_are_left_out(
    everything: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [load_shipped(split, few_rows(tmp_path, split, 1))[0] for split in ("train", "dev")]
    mine = tmp_path / "rows.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [*everything[:2], "--max_new_tokens", "2", "--mode", "greedy", "--dataset", str(mine)]
    result, _ = recipe.run(options(common))
    said = "rows.jsonl: 1 of 2 items show positions of the training data shipped and are left out"
    assert said in capsys.readouterr().out
    (item,) = items_of(result)
    assert item["prompt"] == rows[1]["prompt"]
    unknown, _ = recipe.run(options([*common, "--trained_on"]))
    assert len(items_of(unknown)) == 2
    few, _ = recipe.run(options([*common, "--trained_on", "--max_rows", "1"]))
    assert len(items_of(few)) == 1


def run_of(folder: Path, **summary: Any) -> str:
    """The checkpoint of a run with this summary."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"model": "nano", **summary}))
    return str(folder / "checkpoint")


def known(*models: str) -> tuple[list[str], list[str]]:
    training = options(["--model", *models]).training
    return [source.name for source in training.sources], training.unknown


def test_a_runs_summary_says_what_it_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or a folder, wherever the run was started; what is gone, and what no summary tells, is unknown."""
    (tmp_path / "data" / "folder").mkdir(parents=True)
    for file in ("mine.jsonl", "moved.jsonl"):
        (tmp_path / file).write_text("{}")
    mine, folder = str(tmp_path / "mine.jsonl"), tmp_path / "data" / "folder"
    runs = tmp_path / "runs"
    assert known(run_of(runs / "a", dataset=mine)) == (["shipped", mine], [])
    assert known(run_of(runs / "b", dataset="shipped"), "nano") == (["shipped"], [])
    monkeypatch.chdir(tmp_path.parent)  # elsewhere than the runs were started
    assert known(run_of(runs / "d", dataset="data/folder", dataset_path=str(folder))) == (["shipped", str(folder)], [])
    moved = run_of(runs / "e", dataset="../x.jsonl", dataset_path=str(tmp_path / "moved.jsonl"))
    assert known(moved) == (["shipped", str(tmp_path / "moved.jsonl")], [])
    gone = run_of(runs / "f", dataset="gone.jsonl")
    assert known(gone) == (["shipped"], [f"the training data 'gone.jsonl' of {gone} (it is not there any more)"])
    later = run_of(runs / "g", dataset=mine, model=gone)  # it started from that one
    names, (unknown,) = known(later)
    assert (names, "'gone.jsonl'" in unknown) == (["shipped", mine], True)
    hub = run_of(runs / "h", dataset="owner/rows", dataset_split="all", streaming=True, max_rows=7, model="owner/model")
    training = options(["--model", hub]).training
    assert training.sources[1] == ("owner/rows", "all", True, 7)
    no_summary = "all that {} was trained on (no summary.json of a run stands above it)"
    assert training.unknown == [no_summary.format("owner/model")]
    assert known(str(tmp_path)) == (["shipped"], [no_summary.format(tmp_path)])
    alone = options(["--model", gone, "--trained_on"]).training
    assert (alone.sources, alone.unknown) == ([], ["all that the models were trained on"])
    named = options(["--model", gone, "--trained_on", "gone.jsonl"]).training
    with pytest.raises(ValueError, match=r"gone\.jsonl': there is no such file"):
        unseen([[]], "mine", named)


def test_positions_of_a_folder_and_of_a_stream_are_known(tmp_path: Path) -> None:
    record = pq.read_table(few_rows(tmp_path, "train", 1) / "train.parquet").to_pylist()[0]
    assert position_key(record["fen"]) in shown_positions(str(tmp_path))
    rows = [{"prompt": f"P: 8/8/8/8/8/2k5/P7/{rank} w - - 0 1"} for rank in ("K7", "1K6", "2K5")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(shown_positions(str(tmp_path / "rows.jsonl"), streaming=True, max_rows=2)) == 2


def test_what_is_unknown_of_the_training_is_said_and_kept(
    everything: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the JSON, below the tables, and in their file; where nothing but games is measured it does not matter."""
    output = tmp_path / "out.json"
    common = ["--model", str(tiny_checkpoint), "--max_new_tokens", "2", "--mode", "greedy", "--output", str(output)]
    recipe.main([*common, "--suite", "mate_in_one", "--limit", "2"])
    data = json.loads(output.read_text())["data"]
    unknown = f"all that {tiny_checkpoint} was trained on (no summary.json of a run stands above it)"
    assert (data["trained_on"], data["unknown"]) == (["shipped"], [unknown])
    said = f"Whether these items were seen in training is unknown, for this is: {unknown}"
    assert said in capsys.readouterr().out
    assert said in output.with_suffix(".md").read_text()
    recipe.main([*common, "--suite", "ladder", "--games", "2"])
    assert "Whether these items" not in capsys.readouterr().out
