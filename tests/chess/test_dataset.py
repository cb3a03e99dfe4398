"""The shipped data: no position in two splits, rare events there, small on disk; what the mates and tactics promise.

That train shows none of those is in test_sources.py.
"""

import gzip
from collections import Counter

import chess
import pytest

from recipes.making.shipping import POLICY_ROWS
from recipes.making.transitions import STRATA
from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.dataset import (
    MATES_FILE,
    SHIPPED_DIRECTORY,
    SPLITS,
    TACTICS_FILES,
    load_shipped,
    shipped_positions,
    split_by_hash,
    split_of,
)
from rookworld_trl.chess.policy import win_chance
from rookworld_trl.chess.problems import read_problems


@pytest.fixture(scope="module")
def shipped():
    return {split: load_shipped(split) for split in SPLITS}


def positions(rows) -> set[str]:
    """Every position a split shows, in prompts and in answers."""
    keys = set()
    for prompt, target in zip(rows["prompt"], rows["target"], strict=True):
        if prompt.startswith("P: "):
            keys.add(position_key(policy.parse_prompt(prompt)))
        else:
            keys.add(position_key(environment.parse_prompt(prompt).fen))
            keys.add(position_key(environment.parse(target).fen))
    return keys


def fen_of(prompt: str) -> str:
    return policy.parse_prompt(prompt) if prompt[0] == "P" else environment.parse_prompt(prompt).fen


def test_no_prompt_comes_twice_and_the_files_are_small(shipped):
    for rows in shipped.values():
        assert len(set(rows["prompt"])) == len(rows)
    assert sum(file.stat().st_size for file in SHIPPED_DIRECTORY.glob("*.parquet")) <= 6_000_000


@pytest.mark.slow
def test_splits_share_no_position(shipped):
    seen = {split: positions(rows) for split, rows in shipped.items()}
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]


def test_no_held_out_answer_may_be_trained_on(shipped):
    """Positions that dev and test lead to are held out too, also those whose own hash says train."""
    for split in ("dev", "test"):
        keys = positions(shipped[split])
        assert {split_of(f"{key} 0 1") for key in keys} <= {"dev", "test"}
        assert {split_of(fen_of(prompt)) for prompt in shipped[split]["prompt"]} == {split}
        assert any(split_by_hash(f"{key} 0 1") == "train" for key in keys)


def test_no_game_stands_in_two_splits(shipped):
    games = {
        split: {game for game in rows["game"] if not game.startswith("opening:")} for split, rows in shipped.items()
    }
    for one, two in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert games[one] & games[two] <= {""}
    for split in ("dev", "test"):
        rows = Counter(game for game in shipped[split]["game"] if game)
        assert len(rows) >= 400
        assert max(rows.values()) <= 0.02 * len(shipped[split])


def test_every_stratum_and_both_colours_are_there(shipped):
    strata = Counter(zip(shipped["test"]["task"], shipped["test"]["stratum"], strict=True))
    for kind in STRATA:
        assert strata["environment", kind] >= 200, kind
    for kind in ("human_opening", "opening", "middlegame", "endgame"):
        assert strata["policy", kind] >= 200, kind
    assert sum(strata["policy", kind] for kind in POLICY_ROWS["test"]) >= 2950
    for task in ("policy", "environment"):
        sides = Counter(row["prompt"].split("+")[0].split()[2] for row in shipped["test"] if row["task"] == task)
        assert min(sides.values()) >= 0.35 * sum(sides.values())


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
