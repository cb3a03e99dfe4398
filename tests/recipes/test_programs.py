"""What a user types at `evaluate.py`, `report.py` and `generate_data.py`: one line that names it, and exit code 2."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes import evaluate, generate_data, report

EVALUATE = ("--limit", "1", "--mode", "greedy")
BAD: dict[str, tuple[Callable[[list[str]], None], tuple[str, ...], str]] = {
    "no run": (report.main, ("nowhere",), "nowhere"),
    "no positions": (
        generate_data.main,
        ("dataset", "--positions", "nowhere", "--output", "x"),
        "--positions: nowhere",
    ),
    "no partition": (
        generate_data.main,
        ("positions", "--output", "out", "--shards", "1", "--executor", "slurm"),
        "--partition|datatrove",
    ),
    "no engine": (
        generate_data.main,
        ("positions", "--output", "out", "--shards", "1", "--workers", "1", "--engine", "./script"),
        "'./script' did not start as a UCI engine",
    ),
    **{
        f"{name} {value}": (
            generate_data.main,
            ("positions", "--output", "out", "--engine", "./script", f"--{name}", str(value)),
            f"--{name} must be 1 or more; got {value}",
        )
        for name, value in (("shards", 0), ("workers", 0), ("nodes", 0), ("games_per_shard", -1))
    },
    "no model": (evaluate.main, ("--model", "nowhere", *EVALUATE), "nowhere"),
    "no device": (evaluate.main, ("--device", "cuda:99", *EVALUATE), "`--device` is 'cuda:99'"),
    "nonsense for a device": (evaluate.main, ("--device", "gpu", *EVALUATE), "`--device` is 'gpu'"),
    "no baseline": (
        evaluate.main,
        ("--baseline", "nope.json", *EVALUATE),
        "`--baseline` is 'nope.json': .*No such file",
    ),
    "no JSON": (evaluate.main, ("--baseline", "script", *EVALUATE), "`--baseline` is 'script': "),
    "binary": (evaluate.main, ("--baseline", "binary", *EVALUATE), "`--baseline` is 'binary': "),
    "a list": (evaluate.main, ("--baseline", "list.json", *EVALUATE), "`--baseline` is 'list.json': .*no evaluation"),
    "a suite against a baseline": (
        evaluate.main,
        ("--suite", "selfplay", "--baseline", "nope.json"),
        "--baseline compares evaluations of the suite held_out",
    ),
    "self-play from a file": (
        evaluate.main,
        ("--suite", "selfplay", "--dataset", "x.jsonl"),
        "--suite selfplay takes no --dataset",
    ),
    "a suite without its file": (evaluate.main, ("--suite", "sts"), "--suite sts needs its file"),
    "output is a folder": (evaluate.main, ("--output", ".", *EVALUATE), "--output"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "list.json").write_text("[]")


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, arguments, message = BAD[case]

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured first")

    monkeypatch.setattr(evaluate, "evaluate", nothing)
    monkeypatch.setattr(evaluate, "run_selfplay", nothing)
    with pytest.raises(SystemExit) as exit_:
        program([*arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error
    assert re.search(message, error), error
