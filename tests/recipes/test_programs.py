"""What a user types at the programs without recipes: one line that names it, and exit code 2."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes import evaluate, generate_data, play, report

EVALUATE = "--limit 1 --mode greedy"
POSITIONS = "positions --output out"
EPD = "--dataset mates.epd --trained_on"
BAD: dict[str, tuple[Callable[[list[str]], None], str, str]] = {
    "no run": (report.main, "nowhere", "nowhere"),
    "no positions": (
        generate_data.main, "dataset --positions nowhere --held_out there --output x", "nowhere holds no positions-",
    ),
    "no engine": (
        generate_data.main, f"{POSITIONS} --shards 1 --workers 1", "engine '/no/engine' was not found",
    ),
    **{
        f"{name} {value}": (
            generate_data.main, f"{POSITIONS} --{name} {value}",
            f"--{name} must be 1 or more; got {value}",
        )
        for name, value in (("shards", 0), ("workers", 0), ("nodes", 0), ("games_per_shard", -1))
    },
    "no model": (evaluate.main, f"--model nowhere {EVALUATE}", "nowhere"),
    "no device": (evaluate.main, f"--device cuda:99 {EVALUATE}", "`--device` is 'cuda:99'"),
    "nonsense for a device": (evaluate.main, f"--device gpu {EVALUATE}", "`--device` is 'gpu'"),
    "no baseline": (evaluate.main, f"--baseline nope.json {EVALUATE}", "`--baseline` is 'nope.json': .*No such file"),
    "no JSON": (evaluate.main, f"--baseline script {EVALUATE}", "`--baseline` is 'script': "),
    "binary": (evaluate.main, f"--baseline binary {EVALUATE}", "`--baseline` is 'binary': "),
    "a list": (evaluate.main, f"--baseline list.json {EVALUATE}", "`--baseline` is 'list.json': .*no evaluation"),
    "an empty baseline": (evaluate.main, f"--baseline empty.json {EVALUATE}", "'empty.json': .*no evaluation"),
    "a baseline without the suite": (
        evaluate.main, "--suite mate_in_one --baseline other.json",
        "`--baseline` is 'other.json': .*no 'mate in one', greedy",
    ),
    "a baseline without held-out items": (
        evaluate.main, f"--baseline other.json {EVALUATE}", "`--baseline` is 'other.json': .*no 'policy', greedy",
    ),
    "no such rows": (evaluate.main, "--dataset nothing.jsonl", "nothing.jsonl': there is no such file"),
    "a bad row": (evaluate.main, "--dataset broken.jsonl --trained_on", "broken.jsonl row 1, column 'prompt'"),
    "reading of no rows": (evaluate.main, "--best_move engine", "--best_move says how the rows of --dataset are read"),
    "reading of problems": (
        evaluate.main, "--best_move engine --dataset mates.epd", "--best_move says how the rows of --dataset are read",
    ),
    "two sources of rows": (evaluate.main, "--dataset a.jsonl b.jsonl", "--dataset takes one source of rows"),
    "no such EPD": (evaluate.main, "--dataset nowhere.epd", "nowhere.epd: cannot be read"),
    "no temperature": (evaluate.main, "--temperature 0", "--temperature must be above 0; got 0"),
    "a ladder from a file": (evaluate.main, "--suite ladder --dataset x.pgn", "--dataset x.pgn holds no problems"),
    "odd games of the ladder": (evaluate.main, "--suite ladder --games 3", "--games must be even and 2 or more"),
    "a PGN of no games": (
        evaluate.main, "--pgn games.pgn", "--pgn says where the ladder's games are written",
    ),
    "a PGN that is a folder": (evaluate.main, "--suite ladder --pgn .", "--pgn . is a folder"),
    "no training data": (evaluate.main, f"{EPD} nothing.jsonl", "nothing.jsonl': there is no such file"),
    "nothing left": (
        evaluate.main, f"{EPD} train.jsonl",
        "mates.epd: 1 of 1 items show positions of the training data train.jsonl and are left out: nothing is left",
    ),
    "one player": (play.main, "random", "give two or more players"),
    "a player twice": (play.main, "random random", "two or more players of different names"),
    "no nodes": (play.main, "random stockfish --nodes 0", "--nodes must be 1 or more; got 0"),
    "odd games": (play.main, "random greedy --games 3", "--games must be even"),
    "no model to play": (play.main, "random nowhere --games 2", "nowhere"),
    "output is a folder": (evaluate.main, f"--output . {EVALUATE}", "--output"),
}  # fmt: skip


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
    for case, (program, arguments, message) in BAD.items():
        with pytest.raises(SystemExit) as exit_:
            program(shlex.split(arguments))
        assert exit_.value.code == 2, case
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in error, case
        assert re.search(message, error), f"{case}: {error}"
