"""What the programs show: nothing, bars, or JSON."""

import json
import sys
from pathlib import Path

import pytest

from recipes import generate_data, report
from rookworld_trl.settings import terminal
from rookworld_trl.settings.terminal import TerminalOptions, progress_bar, shown, with_bar


def test_json_alone_is_on_stdout_and_a_result_that_never_came_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), shown(TerminalOptions(json=True)):
        raise SystemExit(2)
    assert capsys.readouterr().out == ""
    with shown(TerminalOptions(json=True), "runs/x") as result:
        print("a table")
        result["steps"] = 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"output_dir": "runs/x", "steps": 3}
    assert out.count("\n") == 1
    assert err == "a table\n"


def test_quiet_is_quiet_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(TerminalOptions(quiet=True)):
        print("a table")
        with progress_bar("work", 3, "item") as bar:
            bar.update()
        print("warning: disk", file=sys.stderr)
    assert capsys.readouterr() == ("", "warning: disk\n")
    with progress_bar("work", 3, "item") as bar:
        assert not bar.disable, "afterwards, bars are there again"


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
