"""Mates in one and tactics: the rules by hand, the shipped files, and that the same seed finds the same ones."""

import gzip
import itertools
import random
from pathlib import Path
from typing import Any

import chess
import pyarrow.parquet as pq
import pytest

from recipes import generate_data
from recipes.making import problems as making
from recipes.making.problems import build_tactics, is_wanted, kind_of, shipped_keys
from rookworld_trl.chess import position_key
from rookworld_trl.chess.dataset import MATES_FILE, TACTICS_FILES, position_number, split_by_hash, split_of
from rookworld_trl.chess.engine import MoveValue
from rookworld_trl.chess.problems import read_problems
from rookworld_trl.chess.seen import shown_positions
from rookworld_trl.chess.strata import winning_move
from tests.support.stockfish import requires_stockfish


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({"a": 300, "b": 110}, "a"),  # win chances 0.751 and 0.600
        ({"a": 300, "b": 115}, None),  # 0.751 and 0.604: less than 0.15 apart
        ({"b": -200, "a": 111}, "a"),  # 0.601
        ({"b": -200, "a": 109}, None),  # 0.599: it saves, it does not win
        ({"a": 9990, "b": 9980, "c": 0}, None),  # two mates
        ({"a": 9990}, None),  # forced
        ({}, None),
    ],
)
def test_one_move_wins_if_every_other_is_a_blunder(values: dict[str, int], best: str | None) -> None:
    assert winning_move(values) == best


# White may take a queen or a rook with its pawn, give check on e1, or move its king.
FEN = "4k3/8/8/8/2q1r3/3P4/R7/7K w - - 0 1"


@pytest.mark.parametrize(
    ("move", "kind"), [("d3c4", "material"), ("d3e4", "capture"), ("a2a8", "check"), ("h1g1", "quiet")]
)
def test_kinds(move: str, kind: str) -> None:
    board = chess.Board(FEN)
    assert kind_of(board, chess.Move.from_uci(move)) == kind
    values = {each.uci(): 0 for each in board.legal_moves} | {move: 900}
    for takes_most in (True, False):
        assert is_wanted(board, None, takes_most, values) == (takes_most == (kind == "material"))
        assert not is_wanted(board, chess.Move.from_uci(move).to_square, takes_most, values)  # it takes back
        assert not is_wanted(board, None, takes_most, values | {"h1h2": 900})


class Scripted:
    """An engine that says what each move of 1. e4 e5 2. Nf3 is worth, and what is played against it."""

    def analyse(self, board: chess.Board, multipv: int, game: object) -> list[MoveValue]:
        losing = {"e8e7": "f3e5", "d8g5": "f3g5", "d8h4": "f3h4", "f7f6": "f3e5", "g7g6": ""}
        moves = [move.uci() for move in board.legal_moves]
        return [MoveValue(m, -300 if m in losing else 0, None, losing.get(m, "b1c3")) for m in moves]


def test_blunders_are_moves_that_lose_and_that_the_wanted_kind_of_move_punishes() -> None:
    board = chess.Board("rnbqkbnr/pppp1ppp/8/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R b KQkq - 1 2")
    after = {each.fen().split()[0] for each, _ in making.blunders(board, True, Scripted(), random.Random(0))}  # type: ignore[arg-type]
    wanted = set()
    for uci in ("e8e7", "d8g5", "d8h4", "f7f6"):
        moved = board.copy()
        moved.push_uci(uci)
        wanted.add(moved.fen().split()[0])
    assert after == wanted
    assert not list(making.blunders(board, False, Scripted(), random.Random(0)))  # type: ignore[arg-type]


def test_the_shipped_mates_are_mates_of_both_colours_that_training_never_shows() -> None:
    problems = read_problems(MATES_FILE)
    boards = [problem.boards[0] for problem in problems]
    keys = {position_key(board.fen()) for board in boards}
    assert len(keys) == len(boards) >= 1000
    assert {group: [p.group for p in problems].count(group) for group in ("white", "black")} == {
        "white": 600,
        "black": 600,
    }
    for problem, board in list(zip(problems, boards, strict=True))[::7]:
        mating = set()
        for move in board.legal_moves:
            after = board.copy()
            after.push(move)
            if after.is_checkmate():
                mating.add(move.uci())
        assert mating == set(problem.worths[0]) != set()
    trained = shown_positions("shipped")
    assert not keys & trained
    assert {split_of(board.fen()) for board in boards} <= {"dev", "test"}, "no source of training may show one"


def test_the_shipped_mates_are_made_again(tmp_path: Path) -> None:
    generate_data.main(["mates", "--output", str(tmp_path), "--count", "2", "--quiet"])
    with gzip.open(MATES_FILE, "rt") as shipped, gzip.open(tmp_path / MATES_FILE.name, "rt") as made:
        assert list(made) == [next(shipped), next(shipped)]
    listed = pq.read_table(tmp_path / "held_out_answers.parquet")["position"].to_pylist()
    for problem in read_problems(tmp_path / MATES_FILE.name):
        fen = problem.boards[0].fen()
        assert split_by_hash(fen) != "train" or position_number(fen) in listed


def test_the_shipped_tactics_are_of_two_splits_that_training_never_shows() -> None:
    keys: dict[str, set[str]] = {}
    games: dict[str, set[str]] = {}
    for split, path in TACTICS_FILES.items():
        problems = read_problems(path)
        boards = [problem.boards[0] for problem in problems]
        keys[split] = {position_key(board.fen()) for board in boards}
        assert len(keys[split]) == len(boards) >= 1000
        kinds = [problem.group for problem in problems]
        assert set(kinds) == {"material", "capture", "check", "quiet"}
        assert kinds.count("material") == len(kinds) - round(len(kinds) / 3)
        for problem, board in list(zip(problems, boards, strict=True))[::9]:
            ((best, worth),) = problem.worths[0].items()
            assert worth == 1
            assert kind_of(board, chess.Move.from_uci(best)) == problem.group
            assert split_of(board.fen()) == split
        with gzip.open(path, "rt") as lines:
            operations = [chess.Board.from_epd(line)[1] for line in lines]
        for each in operations:
            second, game = str(each["c0"]).removeprefix("second best ").split(", game ")
            games.setdefault(split, set()).add(game)
            assert winning_move({"best": int(str(each["ce"])), "second": int(second)}) == "best"
    assert not keys["dev"] & keys["test"]
    assert not games["dev"] & games["test"]
    assert not (keys["dev"] | keys["test"]) & shipped_keys()


@requires_stockfish
def test_the_same_seed_finds_the_same_tactics_however_often_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CHUNK", 1)  # so that both splits take two rounds
    for name, value in (("LOOK_SHARE", 1.0), ("MOST_SHARE", 1.0), ("OTHERS", 0.0), ("MAX_PLIES", 40)):
        monkeypatch.setattr(making, name, value)
    settings: dict[str, Any] = {"count": 1, "nodes": 1_000}
    assert set(build_tactics(tmp_path / "one", (), **settings)) >= {0}
    next(iter(itertools.islice(build_tactics(tmp_path / "two", (), **settings), 1, 2)))  # stopped after one round
    list(build_tactics(tmp_path / "two", (), **settings))
    for split, path in TACTICS_FILES.items():
        first = (tmp_path / "one" / path.name).read_bytes()
        assert first == (tmp_path / "two" / path.name).read_bytes()
        problems = read_problems(tmp_path / "one" / path.name)
        assert len(problems) == 1
        listed = pq.read_table(tmp_path / "one" / "held_out_answers.parquet")
        numbers = dict(zip(listed["position"].to_pylist(), listed["split"].to_pylist(), strict=True))
        for problem in problems:
            fen = problem.boards[0].fen()
            assert split_of(fen) == split or numbers[position_number(fen)] == split
    shown = {position_key(problem.boards[0].fen()) for problem in problems}
    taken = {1: [{"fen": f"{key} 0 1", "takes_most": True} for key in shown]}
    assert making.choose(taken, 4, shown)["test"] == []
