"""What the programs show: nothing, bars, or JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import concatenate_datasets

from recipes import evaluate, generate_data, play, report
from rookworld_trl.chess.dataset import SHIPPED_DIRECTORY, load_shipped
from rookworld_trl.chess.sources import check_lengths
from rookworld_trl.settings import terminal
from rookworld_trl.settings.terminal import TerminalOptions, progress_bar, shown, with_bar

# What is printed


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(TerminalOptions(json=True), "runs/x") as result:
        print("a table")
        result["steps"] = 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"output_dir": "runs/x", "steps": 3}
    assert out.count("\n") == 1
    assert err == "a table\n"


def test_a_result_that_never_came_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), shown(TerminalOptions(json=True)):
        raise SystemExit(2)
    assert capsys.readouterr().out == ""


def test_quiet_is_quiet_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(TerminalOptions(quiet=True)):
        print("a table")
        with progress_bar("work", 3, "item") as bar:
            bar.update()
        print("warning: disk", file=sys.stderr)
    assert capsys.readouterr() == ("", "warning: disk\n")
    with progress_bar("work", 3, "item") as bar:
        assert not bar.disable, "afterwards, bars are there again"


def test_a_bar_tells_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0.0)
    with progress_bar("work", 4, "item") as bar:
        bar.update(2)
        bar.refresh()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("work: 2 of 4 items after 00:00, 00:00 left")


def test_a_bar_comes_only_where_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(with_bar("abc", "work", 3, "item")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(terminal, "BAR_AFTER", 0.0)
    list(with_bar("abc", "work", 3, "item"))
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("work: 3 of 3 items after 00:00")
    with shown(TerminalOptions(quiet=True)):
        list(with_bar("abc", "work", 3, "item"))
    assert capsys.readouterr().err == ""


def test_reading_and_measuring_prompts_have_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Of the shipped rows both take several seconds at the start of a run."""
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(terminal, "BAR_AFTER", 0.0)
    table = pq.read_table(SHIPPED_DIRECTORY / "train.parquet").slice(0, 3)
    pq.write_table(table, tmp_path / "train.parquet")
    rows = load_shipped("train", tmp_path)
    assert "read train: 3 of 3 rows" in capsys.readouterr().err
    check_lengths(concatenate_datasets([rows, rows]), tiny_tokenizer, context=1000, max_completion_length=10)
    assert "measure prompts: 3 of 3 prompts" in capsys.readouterr().err, "each distinct prompt is measured once"


@pytest.mark.parametrize(
    "program",
    ["evaluate", "generate_data positions", "generate_data dataset", "report", "play"],
)
def test_every_program_is_quiet_and_speaks_json(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *command = program.split()
    programs = (evaluate, generate_data, report, play)
    (main,) = (each.main for each in programs if each.__name__ == f"recipes.{name}")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert "--quiet" in out
    assert "--json" in out


def test_generate_data_and_report_print_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = iter([(0, 7), (1, 5)])
    monkeypatch.setattr(generate_data, "generate_positions", lambda *_: made)
    generate_data.main(["positions", "--output", str(tmp_path), "--shards", "2", "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert json.loads(out) == {"output": str(tmp_path), "positions": 12}
    assert err == ""
    monkeypatch.setattr(report, "write_report", lambda run, output, boards: Path("x.html"))
    report.main(["runs/demo", "--json"])
    assert json.loads(capsys.readouterr().out) == {"report": "x.html"}
