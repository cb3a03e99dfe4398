"""What a user types at the programs without recipes: one line that names it, and exit code 2."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes import evaluate, generate_data, report

EVALUATE = "--limit 1 --mode greedy"
POSITIONS = "positions --output out"
EPD = "--dataset mates.epd --trained_on"
READING = "--best_move says how the rows of --dataset are read"
BAD: dict[Callable[[list[str]], None], dict[str, str]] = {  # what is typed, and the pattern of what is said
    report.main: {"nowhere": "nowhere"},
    generate_data.main: {
        "dataset --positions nowhere --held_out there --output x": "nowhere holds no positions-",
        f"{POSITIONS} --shards 1 --workers 1": "engine '/no/engine' was not found",
        "mates --output out": "'mates' is no command; write `positions` or `dataset`",
        **{f"{POSITIONS} --{n} 0": f"`{n}` is 0: it must be a.* of at least 1" for n in ("shards", "workers", "nodes")},
    },
    evaluate.main: {
        f"--model nowhere {EVALUATE}": "nowhere",
        f"--device cuda:99 {EVALUATE}": "`--device` is 'cuda:99'",
        f"--device gpu {EVALUATE}": "`--device` is 'gpu'",
        f"--baseline nope.json {EVALUATE}": "`--baseline` is 'nope.json': .*No such file",
        f"--baseline script {EVALUATE}": "`--baseline` is 'script': ",
        f"--baseline binary {EVALUATE}": "`--baseline` is 'binary': ",
        f"--baseline list.json {EVALUATE}": "`--baseline` is 'list.json': .*no evaluation",
        f"--baseline empty.json {EVALUATE}": "'empty.json': .*no evaluation",
        "--suite mate_in_one --baseline other.json": "`--baseline` is 'other.json': .*no 'mate in one', greedy",
        f"--baseline other.json {EVALUATE}": "`--baseline` is 'other.json': .*no 'policy', greedy",
        "--dataset nothing.jsonl": "nothing.jsonl': there is no such file",
        "--dataset broken.jsonl --trained_on": "broken.jsonl row 1, column 'prompt'",
        "--best_move engine": READING,
        "--best_move engine --dataset mates.epd": READING,
        "--dataset a.jsonl b.jsonl": "--dataset takes one source of rows",
        "--dataset nowhere.epd": "nowhere.epd: cannot be read",
        "--temperature 0": "--temperature must be above 0; got 0",
        "--suite ladder --dataset x.pgn": "--dataset x.pgn holds no problems",
        "--suite ladder --games 3": "--games must be even and 2 or more",
        "--pgn games.pgn": "--pgn says where the ladder's games are written",
        "--suite ladder --pgn .": "--pgn . is a folder",
        f"--output . {EVALUATE}": "--output",
        f"{EPD} nothing.jsonl": "nothing.jsonl': there is no such file",
        f"{EPD} train.jsonl": "mates.epd: 1 of 1 items show .* of the training data train.jsonl .*: nothing is left",
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOCKFISH_PATH", "/no/engine")
    (tmp_path / "script").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "other.json").write_text('{"models": [{"results": []}]}')
    fen = "rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq -"
    (tmp_path / "mates.epd").write_text(f"{fen} bm Qh4#;\n")
    (tmp_path / "broken.jsonl").write_text(
        '{"prompt": "A: 4k3/8/8/8/8/8/8/4K3 w - - 0 1+e1e2+e1e2+"}\n{"prompt": "A: x"}\n'
    )
    (tmp_path / "train.jsonl").write_text(f'{{"prompt": "P: {fen} 3 9"}}\n')


def test_bad_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured first")

    monkeypatch.setattr(evaluate, "evaluate", nothing)
    for program, arguments, message in ((each, *case) for each, cases in BAD.items() for case in cases.items()):
        with pytest.raises(SystemExit) as exit_:
            program(shlex.split(arguments))
        assert exit_.value.code == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in error, arguments
        assert re.search(message, error), f"{arguments}: {error}"
