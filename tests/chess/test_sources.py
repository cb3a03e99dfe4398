"""A user's own data set: what is filled in, by engines too, and bad rows named with field and remedy."""

import gzip
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import chess
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from rookworld_trl.chess.dataset import (
    PROBLEM_FILES,
    SHIPPED_DIRECTORY,
    Report,
    draw_of_each,
    held_out_positions,
    positions_in,
    shipped_positions,
)
from rookworld_trl.chess.engine import Engine, MoveValue, ValueCache
from rookworld_trl.chess.problems import read_problems
from rookworld_trl.chess.rewards import environment_reward
from rookworld_trl.chess.sources import (
    FEATURES,
    DataOptions,
    check_lengths,
    load_prompts,
    with_values,
    without,
)
from tests.support.stockfish import requires_stockfish

# White: king a1, pawn a2; black: king c3 keeps b2 and, with Kc3, b1 stays free. Moves of White by hand: Kb1, a3, a4.
FEN = "8/8/8/8/8/2k5/P7/K7 w - - 0 1"
POLICY = {"prompt": f"P: {FEN}", "legal_moves": ["a1b1", "a2a3", "a2a4"], "legal_cp": [-10, 0, 5]}
ENVIRONMENT = {"prompt": f"A: {FEN}+a2a3+a2a3+"}
ELSEWHERE = {
    "prompt": "P: 8/8/8/8/8/2k5/7P/K7 w - - 0 1",
    "legal_moves": ["a1a2", "a1b1", "h2h3", "h2h4"],
    "legal_cp": [0, 0, 0, 0],
}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    return tmp_path / "mine.jsonl"


def test_missing_columns_are_filled_in(jsonl):
    dataset = load_prompts(write(jsonl, POLICY, ENVIRONMENT))
    assert dataset.features == FEATURES
    policy, environment = dataset
    assert (policy["task"], policy["stratum"], policy["legal_cp"]) == ("policy", "endgame", [-10, 0, 5])
    assert (environment["task"], environment["stratum"]) == ("environment", "quiet")
    assert environment["target"] == "8/8/8/8/8/P1k5/8/K7 b - - 0 1+0.001+0+0"
    assert (environment["legal_moves"], environment["legal_cp"]) == ([], [])


# After 1. e4, as many programs write it: with a square that no pawn can take on.
IDLE_SQUARE = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq e3 0 1"


@pytest.mark.parametrize(
    ("move", "answer"),
    [
        ("e7e4", f"{IDLE_SQUARE}+-1.0+0+1"),  # illegal: the position stays as the prompt writes it
        ("e7e5", "rnbqkbnr/pppp1ppp/8/4p3/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2+0.001+0+0"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_an_idle_en_passant_square_leaves_prompt_and_answer_in_agreement(tmp_path, kind, move, answer):
    prompt = f"A: {IDLE_SQUARE}+{move}+e2e4 {move}+"
    path = tmp_path / f"mine.{kind}"
    path.write_text(json.dumps({"prompt": prompt, "target": answer}) + "\n" if kind == "jsonl" else prompt + answer)
    (row,) = load_prompts(str(path))
    assert (row["prompt"], row["target"]) == (prompt, answer)
    assert environment_reward([prompt], [answer], target=[row["target"]]) == [1.0]
    copied = f"{IDLE_SQUARE}+0.001+0+0"
    assert environment_reward([prompt], [copied], target=[row["target"]])[0] <= 0.2


def csv_text(row: dict) -> str:
    """Lists as JSON."""
    cells = [json.dumps(value).replace('"', '""') if isinstance(value, list) else value for value in row.values()]
    return ",".join(row) + "\n" + ",".join(f'"{cell}"' for cell in cells) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("MINE.JSONL", json.dumps(POLICY).encode()),
        ("mine.JSON", json.dumps(POLICY).encode()),
        ("mine.jsonl.gz", gzip.compress(json.dumps(POLICY).encode())),
        ("mine.csv", csv_text(POLICY).encode()),
        (
            "gaps.jsonl",
            json.dumps(POLICY | {"legal_cp": [-10.0, 0.0, 5.0]}).encode(),
        ),  # as pandas writes a column with a gap
        ("mine.parquet", None),
    ],
)
def test_every_kind_of_file(tmp_path, name, content):
    if content is None:
        Dataset.from_list([POLICY]).to_parquet(str(tmp_path / name))
    else:
        (tmp_path / name).write_bytes(content)
    (row,) = load_prompts(str(tmp_path / name))
    assert {name: row[name] for name in POLICY} == POLICY


BAD_ROWS = {
    "no prefix": ({"prompt": f"Q: {FEN}"}, r"column 'prompt': field 'prefix'.*start the text with 'P: ' or 'A: '"),
    "no text": ({"prompt": None}, r"column 'prompt': None is no text"),
    "not a FEN": (POLICY | {"prompt": "P: 8/8/8 w - - 0 1"}, r"column 'prompt': field 'fen'.*six"),
    "illegal position": (POLICY | {"prompt": "P: 8/8/8/8/8/8/P7/K7 w - - 0 1"}, r"'fen'.*illegal \(no_black_king"),
    "A: without history": ({"prompt": f"A: {FEN}+a2a3"}, r"field 'prompt'.*write 'A: <FEN>"),
    "other task": (POLICY | {"task": "environment"}, r"column 'task': 'environment' contradicts"),
    "another answer": (
        ENVIRONMENT | {"target": "8/8/8/8/8/P1k5/8/K7 w - - 0 1+0.001+0+0"},
        r"column 'target': '8/8/8/8/8/P1k5/8/K7 w .* but python-chess says '8/8/8/8/8/P1k5/8/K7 b ",
    ),
    "no values": ({"prompt": f"P: {FEN}"}, r"column 'legal_moves': a 'P:' row needs it.*generate_data"),
    "one value short": (POLICY | {"legal_cp": [1, 2]}, r"column 'legal_cp': 2 values for 3 moves"),
    "a move missing": (
        POLICY | {"legal_moves": ["a1b1", "a2a3"], "legal_cp": [1, 2]},
        r"column 'legal_moves': not the 3 legal moves of the position \(look at a2a4\)",
    ),
    "an illegal move": (POLICY | {"legal_moves": ["a1b1", "a2a3", "a2a5"]}, r"'legal_moves'.*look at a2a4, a2a5"),
    "values in words": (POLICY | {"legal_cp": ["a", "b", "c"]}, r"column 'legal_cp': 'a' is no whole number"),
    "values beyond mate": (
        POLICY | {"legal_cp": [10**12, 2, 3]},
        r"column 'legal_cp': 1000000000000 is no whole number, or beyond",
    ),
    "moves as a text": (POLICY | {"legal_moves": "a1b1 a2a3 a2a4"}, r"column 'legal_moves': .*needs it, found 'a1b1"),
    "game over": ({"prompt": "P: k7/1Q6/1K6/8/8/8/8/8 b - - 0 1", "legal_moves": ["a8b8"], "legal_cp": [0]}, "is over"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(jsonl, case):
    row, message = BAD_ROWS[case]
    good = {"legal_moves": [], "legal_cp": []} | ENVIRONMENT if isinstance(row.get("prompt"), str) else ENVIRONMENT
    with pytest.raises(ValueError, match=rf"mine\.jsonl row 1, (?s:.*){message}"):
        load_prompts(write(jsonl, good, row))


def test_without_the_prompt_column(jsonl):
    with pytest.raises(
        ValueError, match=r"column 'prompt' is missing \(found: row\). Add it.*or give whole rows in a column 'text'"
    ):
        load_prompts(write(jsonl, {"row": "P: x"}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.parquet", None, "gone.parquet': there is no such file, or it is empty"),
        ("rows.doc", b"x", "is no data file. Give `dataset` a file ending in .parquet"),
        ("empty.jsonl", b"", "empty.jsonl': there is no such file, or it is empty"),
        ("torn.jsonl", b'{"prompt": "P: 8/', "torn.jsonl': cannot be read as json"),
        ("header.csv", b"prompt,legal_moves,legal_cp\n", "header.csv': cannot be read as csv .*no data"),
        ("binary.parquet", bytes(range(256)) * 8, "binary.parquet': cannot be read as parquet"),
        ("binary.pgn.gz", bytes(range(256)) * 8, "binary.pgn.gz: .*cannot be read as pgn"),
    ],
)
def test_an_unreadable_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / name))


def test_an_unknown_name():
    with pytest.raises(ValueError, match="`dataset` is 'nobody/nothing': neither a file here nor split 'train'"):
        load_prompts("nobody/nothing")


def test_a_draw_is_random_over_games_and_the_same_every_time():
    """Nine games of ten rows and ten rows of none: nineteen draws see all of them, in the data set's order."""
    games = [str(i // 10) if i < 90 else "" for i in range(100)]
    dataset = Dataset.from_dict({"task": ["policy"] * 100, "game": games, "number": list(range(100))})
    drawn = draw_of_each(dataset, {"policy": 19, "environment": 5})
    assert drawn["game"] == [str(i) for i in range(9)] + [""] * 10
    numbers = list(drawn["number"])
    assert numbers == sorted(numbers)
    assert [i % 10 for i in numbers[:9]] != [0] * 9, "the first rows of each game are all openings"
    assert list(draw_of_each(dataset, {"policy": 19})["number"]) == numbers
    few = [int(game) for game in draw_of_each(dataset, {"policy": 6})["game"] if game]
    assert len(few) == len(set(few))
    assert few != list(range(len(few))), "a draw is not the beginning of the file"
    more = list(draw_of_each(dataset, {"policy": 30})["game"])
    assert all(more.count(str(game)) >= 2 for game in range(9)), "second rows come after the first of all"
    without_games = draw_of_each(dataset.remove_columns("game"), {"policy": 50})
    assert 5 < sum(number < 50 for number in without_games["number"]) < 45


# By hand: a2a3 leads to the first one's position, and so does b1a1 of the second one; clocks differ.
BEHIND = {"prompt": "A: 8/8/8/8/8/P1k5/8/K7 b - - 3 9+c3b3+c3b3+"}
THERE_TOO = {"prompt": "A: 8/8/8/8/8/P1k5/8/1K6 w - - 0 1+b1a1+b1a1+"}
LATE = POLICY | {"prompt": POLICY["prompt"].replace("0 1", "7 40")}


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [(BEHIND, ENVIRONMENT), (ENVIRONMENT, BEHIND), (ENVIRONMENT, THERE_TOO), (THERE_TOO, BEHIND), (LATE, ENVIRONMENT)],
    ids=[
        "prompt, in answer",
        "answer, in prompt",
        "answer, in answer",
        "answer of other moves",
        "other task and clocks",
    ],
)
def test_positions_behind_the_moves_are_held_out_too(jsonl, tmp_path, held_out, trained):
    kept, dropped = without(
        load_prompts(write(tmp_path / "train.jsonl", trained, ELSEWHERE)),
        positions_in(load_prompts(write(jsonl, held_out))),
    )
    assert (list(kept["task"]), dropped) == (["policy"], 1)


def test_no_position_that_is_measured_on_is_trained_on():
    """As `P:` prompts: every position of dev and of test, before the move and behind it, each mate and each tactic."""
    fens = {problem.boards[0].fen() for file in PROBLEM_FILES for problem in read_problems(file)}
    assert len(fens) == 3_200
    for split in ("dev", "test"):
        for record in pq.read_table(SHIPPED_DIRECTORY / f"{split}.parquet").to_pylist():
            board = chess.Board(record["fen"])
            fens.add(board.fen())
            if record["move"] and (move := chess.Move.from_uci(record["move"])) in board.legal_moves:
                board.push(move)
                fens.add(board.fen())
    assert len(fens) > 3_200 + 3_890 + 6_780 + 1_700 + 3_400
    rows = {"prompt": [f"P: {fen}" for fen in sorted(fens)], "target": [""] * len(fens)}
    kept, dropped = without(Dataset.from_dict(rows), held_out_positions())
    assert (list(kept["prompt"]), dropped) == ([], len(fens))
    assert not shipped_positions("train") & held_out_positions()


def test_prompts_that_leave_no_room_are_named(jsonl, tiny_tokenizer):
    mixed = load_prompts(write(jsonl, ENVIRONMENT, POLICY))
    longest = len(ENVIRONMENT["prompt"])  # one token a character
    check_lengths(mixed, tiny_tokenizer, context=longest + 10, max_completion_length=10)
    with pytest.raises(ValueError, match=rf"`max_completion_length` is 11: .*{longest} tokens.* Write 10 or less"):
        check_lengths(mixed, tiny_tokenizer, context=longest + 10, max_completion_length=11)


@pytest.mark.parametrize(("name", "value"), [("engine_nodes", 0), ("max_rows", 0)])
def test_options_that_would_read_nothing(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` is {value}: .*Set it to 1 or more"):
        DataOptions(**{name: value})


# Rows without values: engines give them, and the answers are kept ----------------------------------------------------

START = chess.STARTING_FEN
MATE_IN_ONE = "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1"


class FixedPool:
    """Values every legal move: the later in the alphabet, the better. Searches of `failing` fail."""

    def __init__(self, failing: Sequence[str] = ()):
        self.failing = failing

    def values(self, fens: Sequence[str]) -> Iterator[list[MoveValue] | None]:
        for fen in fens:
            moves = sorted((move.uci() for move in chess.Board(fen).legal_moves), reverse=True)
            values = [MoveValue(move, 50 - 10 * rank) for rank, move in enumerate(moves)]
            yield None if fen in self.failing else values


def bare(fen: str, target: str = "") -> dict:
    return {"prompt": f"P: {fen}", "task": "policy", "target": target, "legal_moves": [], "legal_cp": []}


def test_every_move_is_valued_and_b_is_the_best_of_the_rows_own() -> None:
    report = Report()
    environment = {"prompt": "A: ...", "task": "environment", "target": "t", "legal_moves": [], "legal_cp": []}
    valued = bare(START) | {"legal_moves": ["e2e4"], "legal_cp": [1]}
    written = " M: d2d4 e2e4 E: 0.2 0.3 B: d2d4"
    rows = [bare(START, written), environment, bare(MATE_IN_ONE), dict(valued), bare(START)]
    first, second, third, fourth = with_values(rows, FixedPool([MATE_IN_ONE]), report)
    assert first["legal_cp"][first["legal_moves"].index("h2h4")] == 50  # the best, but not the row's
    assert first["target"] == " M: d2d4 e2e4 E: 0.2 0.3 B: e2e4"
    assert (second, third) == (environment, valued)
    assert fourth["target"].endswith("B: h2h4")
    assert report.counts == {
        "P: rows valued by an engine": 2,
        "P: rows left out because a search failed": 1,
        "P: rows whose 'B:' a better move of their list replaced": 1,
    }
    as_good = " M: d2d4 e2e4 E: 0.2 0.3 B: e2e4"
    (row,) = with_values([bare(START, as_good)], FixedPool(), Report())
    assert row["target"] == as_good


@requires_stockfish
def test_stockfish_values_a_users_prompts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cache = tmp_path / "prompts.jsonl", tmp_path / "cache" / "values.sqlite"
    fens = [START, MATE_IN_ONE]
    path.write_text("".join(json.dumps({"prompt": f"P: {fen}"}) + "\n" for fen in fens))
    options = DataOptions(best_move="engine", engine_nodes=500, engine_cache=str(cache))
    rows = load_prompts(str(path), options=options)
    for row, fen in zip(rows, fens, strict=True):
        assert row["legal_moves"] == sorted(move.uci() for move in chess.Board(fen).legal_moves)
    assert rows[1]["target"].endswith("B: a1a8")
    assert rows[1]["legal_cp"][rows[1]["legal_moves"].index("a1a8")] == 9999
    assert "2 P: rows valued" in capsys.readouterr().out
    size = cache.stat().st_size
    again = load_prompts(str(path), options=options)  # by the cache
    assert again["legal_cp"] == rows["legal_cp"]
    assert cache.stat().st_size == size


@requires_stockfish
def test_a_run_that_is_killed_while_it_values_asks_only_for_the_rest(tmp_path: Path) -> None:
    """Prompts valued by a process that is killed, then by another: what the first has kept is asked once."""
    boards = [chess.Board()]
    while len(boards) < 40:  # different positions, in each of which the engine is busy for a while
        board = boards[-1].copy()
        board.push(sorted(board.legal_moves, key=lambda move: (len(boards) * 7 + move.to_square * 5) % 23)[0])
        boards.append(board)
    path = write(tmp_path / "rows.jsonl", *({"prompt": f"P: {each.fen()}"} for each in boards))
    cache = tmp_path / "values.sqlite"
    options = DataOptions(best_move="engine", engine_nodes=200_000, engine_cache=str(cache))
    code = f"from rookworld_trl.chess.sources import *; load_prompts({path!r}, options={options!r})"

    def count_kept() -> int:
        with closing(ValueCache(cache)), closing(sqlite3.connect(cache)) as answers:
            return answers.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while count_kept() < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept, asked, analyse = count_kept(), [], Engine.analyse
    with patch.object(Engine, "analyse", lambda self, board, **how: asked.append(board) or analyse(self, board, **how)):
        rows = load_prompts(path, options=options)
    assert 3 <= kept < len(boards)
    assert len(asked) == len(boards) - kept
    assert [len(row["legal_cp"]) for row in rows] == [board.legal_moves.count() for board in boards]
