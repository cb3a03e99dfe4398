"""The shipped mates in one and tactics: what their files promise. That train shows none is in test_sources.py."""

import gzip
from collections import Counter

import chess

from rookworld_trl.chess import position_key
from rookworld_trl.chess.dataset import MATES_FILE, TACTICS_FILES, shipped_positions, split_of
from rookworld_trl.chess.policy import win_chance
from rookworld_trl.chess.problems import read_problems


def test_the_mates_are_mates_of_both_colours() -> None:
    problems = read_problems(MATES_FILE)
    boards = [problem.boards[0] for problem in problems]
    keys = {position_key(board.fen()) for board in boards}
    assert len(keys) == len(boards)
    assert Counter(problem.group for problem in problems) == {"white": 600, "black": 600}
    for problem, board in list(zip(problems, boards, strict=True))[::7]:
        mating = set()
        for move in board.legal_moves:
            after = board.copy()
            after.push(move)
            if after.is_checkmate():
                mating.add(move.uci())
        assert mating == set(problem.worths[0]) != set()
    assert {split_of(board.fen()) for board in boards} <= {"dev", "test"}, "no source of training may show one"


def test_the_tactics_are_of_two_splits() -> None:
    keys: dict[str, set[str]] = {}
    games: dict[str, set[str]] = {}
    for split, path in TACTICS_FILES.items():
        problems = read_problems(path)
        boards = [problem.boards[0] for problem in problems]
        keys[split] = {position_key(board.fen()) for board in boards}
        assert len(keys[split]) == len(boards) == 1000
        kinds = Counter(problem.group for problem in problems)
        assert set(kinds) == {"material", "capture", "check", "quiet"}
        assert kinds["material"] == 667
        assert {split_of(board.fen()) for board in boards} == {split}
        with gzip.open(path, "rt") as lines:
            operations = [chess.Board.from_epd(line)[1] for line in lines]
        for each in operations:  # the best move wins, and every other one is a blunder
            second, game = str(each["c0"]).removeprefix("second best ").split(", game ")
            games.setdefault(split, set()).add(game)
            best = win_chance(int(str(each["ce"])))
            assert best >= 0.6
            assert best - win_chance(int(second)) >= 0.15
    assert not keys["dev"] & keys["test"]
    assert not games["dev"] & games["test"]
    mates = {position_key(problem.boards[0].fen()) for problem in read_problems(MATES_FILE)}
    assert not (keys["dev"] | keys["test"]) & mates.union(*map(shipped_positions, ("dev", "test")))
