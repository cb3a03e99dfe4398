"""The shipped data: no position in two splits, values for every legal move, rare events there, small on disk."""

from collections import Counter

import chess
import pytest

from recipes.making.shipping import POLICY_ROWS
from recipes.making.transitions import STRATA
from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.dataset import SHIPPED_DIRECTORY, SPLITS, load_shipped, split_by_hash, split_of


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
