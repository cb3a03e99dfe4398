"""The shipped data: no position in two splits, values for every legal move, rare events there, small on disk."""

from collections import Counter
from pathlib import Path
from typing import Any

import chess
import numpy as np
import pyarrow.parquet as pq
import pytest

from recipes.making.shipping import POLICY_ROWS
from recipes.making.transitions import STRATA
from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.dataset import SHIPPED_DIRECTORY, SPLITS, expand, load_shipped, split_by_hash, split_of


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


def test_every_legal_move_has_a_value_and_the_target_lists_the_five_best(shipped):
    for row in shipped["test"]:
        if row["task"] == "environment":
            assert row["legal_moves"] == row["legal_cp"] == []
            continue
        board = chess.Board(policy.parse_prompt(row["prompt"]))
        assert row["legal_moves"] == sorted(move.uci() for move in board.legal_moves)
        values = dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
        target = policy.parse(row["target"])
        assert len(target.moves) == min(5, len(values)) == len(set(target.moves))
        assert values[target.best] == max(values.values())
        assert (
            sorted((values[move] for move in target.moves), reverse=True)
            == (sorted(values.values(), reverse=True)[: len(target.moves)])
        )
        assert target.best in target.moves
        assert list(target.evals) == [
            policy.parse(f" M: a1a2 E: {policy.format_eval(values[move])} B: a1a2").evals[0] for move in target.moves
        ]


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


def test_histories_of_several_lengths_are_there(shipped):
    prompts = [row["prompt"] for row in shipped["test"] if row["task"] == "environment"]
    lengths = Counter(len(environment.parse_prompt(prompt).history) for prompt in prompts)
    assert min(lengths[number] for number in (1, 2, 5, 10)) >= 200


def test_the_input_copied_is_hardly_ever_the_answer(shipped):
    rows = [row for row in shipped["test"] if row["task"] == "environment"]
    copies = [f"{environment.parse_prompt(row['prompt']).fen}+0.001+0+0" for row in rows]
    assert sum(copy == row["target"] for copy, row in zip(copies, rows, strict=True)) == 0


def test_what_does_not_fit_is_refused():
    record = {"task": "policy", "fen": chess.STARTING_FEN, "cp": [0] * 19, "stratum": "opening"}
    with pytest.raises(ValueError, match="19 values for 20 legal moves"):
        expand(record)
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        load_shipped("validation")


@pytest.mark.slow
def test_the_page_says_how_near_test_is_to_train() -> None:
    """No game is in two splits but lines of human openings; positions of test that are one move from one in train."""
    rows = {split: pq.read_table(SHIPPED_DIRECTORY / f"{split}.parquet").to_pylist() for split in ("train", "test")}
    games = {split: {row["game"] for row in found if row["game"]} for split, found in rows.items()}
    openings = {game for game in games["test"] if game.startswith("opening:")}
    both = games["train"] & games["test"]
    assert both <= openings

    def men(board: chess.Board) -> Any:
        return np.frombuffer("".join(str(board).split()).encode(), np.uint8)

    shown = {position_key(row["fen"]) for row in rows["train"]}
    boards = {key: chess.Board(f"{key} 0 1") for key in shown}
    squares = np.stack([men(board) for board in boards.values()])
    before = list(boards.values())

    def near(fen: str) -> bool:
        board = chess.Board(fen)
        if any(position_key(after(board, move)) in shown for move in board.legal_moves):
            return True
        differ = (squares != men(board)).sum(axis=1)  # a move changes 2 to 4
        candidates = [before[i] for i in np.flatnonzero((differ >= 2) & (differ <= 4))]
        return any(
            position_key(after(one, move)) == position_key(fen) for one in candidates for move in one.legal_moves
        )

    def after(board: chess.Board, move: chess.Move) -> str:
        board.push(move)
        fen = board.fen()
        board.pop()
        return fen

    count = Counter(row["stratum"] for row in rows["test"] if row["task"] == "policy" and near(row["fen"]))
    total = Counter(row["stratum"] for row in rows["test"] if row["task"] == "policy")
    assert set(count) == {"human_opening", "opening"}
    page = " ".join((Path(__file__).parents[2] / "docs" / "data.md").read_text().split())
    assert f"{len(both)} of the {len(openings)} openings that name rows of test" in page
    assert f"{count['human_opening']} of {total['human_opening']} `P:` rows of human openings" in page
    assert f"{count['opening']} of {total['opening']} rows of other openings, and none of later phases" in page
