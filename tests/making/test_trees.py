"""The trees that supervised training reads: what a `P:` row asks for by hand, `A:` rows, and the order of both."""

import json
import math
import random
from pathlib import Path
from typing import Any

import chess
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from recipes.making.generation import POSITION_SCHEMA
from recipes.making.trees import (
    Words,
    environment_tree,
    legal_tree,
    mirrored,
    policy_tree,
    position_trees,
    read_positions,
    with_twins,
)
from rookworld_trl.chess import environment, policy, position_key
from rookworld_trl.chess.dataset import split_of
from rookworld_trl.chess.policy import win_chance
from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer, build_nano_tokenizer

KING = "7k/8/8/8/8/8/8/K7 w - - 0 1"  # a1a2, a1b1, a1b2
RECORD: dict[str, Any] = {"fen": KING, "history": "", "moves": ["a1b2", "a1a2"], "cp": [60, 20], "played": "a1b2"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_nano_tokenizer()


def records(games: int) -> list[dict[str, Any]]:
    """Positions of random games, five moves of each and values that fall by 20 centipawns."""
    dice, found = random.Random(0), []
    for game in range(games):
        board = chess.Board()
        for _ in range(dice.randint(2, 30)):
            moves = [move.uci() for move in board.legal_moves]
            if not moves:
                break
            history = " ".join(move.uci() for move in board.move_stack[-9:])
            record = {"fen": board.fen(), "history": history, "played": moves[0], "game": game}
            found.append(record | {"moves": moves[:5], "cp": [50, 30, 10, -10, -30][: len(moves)]})
            board.push_uci(dice.choice(moves))
    return found


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=POSITION_SCHEMA), folder / name)
    return folder / name


def wanted(tree: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """What is to be written behind each text of a tree, with its weight."""
    starts: list[str] = []
    open_: list[int] = []
    for node, token in enumerate(tree["input_ids"].tolist()):
        while open_ and tree["ends"][open_[-1]] <= node:
            open_.pop()
        before = starts[open_[-1]] if open_ else ""
        starts.append(before + "".join(tokenizer.convert_ids_to_tokens([token])))
        open_.append(node)
    found: dict[str, dict[str, float]] = {}
    for node, token, weight in zip(tree["nodes"], tree["tokens"], tree["weights"], strict=True):
        text = starts[node].partition(" 0 1")[2]
        found.setdefault(text, {})[tokenizer.convert_ids_to_tokens(int(token))] = float(weight)
    return found


def test_a_policy_tree_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of three legal moves two are listed: 85 % go to these by their win chance, 15 % to all that are left."""
    better = 1 / (1 + math.exp((win_chance(20) - win_chance(60)) / 0.04))
    tree = policy_tree(RECORD, Words(tokenizer), random.Random(0)).arrays()
    asked = wanted(tree, tokenizer)
    assert asked[""] == {" M:": 1.0}
    assert asked[" M:"] == pytest.approx({" a1": 1.0})
    assert asked[" M: a1"] == pytest.approx(
        {"b2": 0.85 * better + 0.05, "a2": 0.85 * (1 - better) + 0.05, "b1": 0.05}, rel=1e-5
    )
    (second,) = [text for text in asked if text.startswith(" M: a1") and len(text) == len(" M: a1b2 a1")]
    first, other = (second[6:8], "a2" if second[6:8] == "b2" else "b2")
    assert asked[second] == pytest.approx({other: 0.85 + 0.075, "b1": 0.075})
    best = next(text for text in asked if text.endswith(" B: a1"))
    assert asked[best] == pytest.approx({"b2": 2 * better, "a2": 2 * (1 - better)}, rel=1e-5)
    assert asked[best + "b2"] == {"<|endoftext|>": 1.0}
    assert first in ("a2", "b2")


def test_a_tokenizer_without_the_side_in_front_is_followed(tokenizer: PreTrainedTokenizerFast) -> None:
    """rookworld-nano's earlier generations have one; training that goes on from such a checkpoint reads its tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for mark in ("⟨w⟩", "⟨b⟩"):
        del parts["model"]["vocab"][mark]
    parts["normalizer"]["normalizers"] = parts["normalizer"]["normalizers"][:-2]
    earlier = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<|endoftext|>")
    prompt = policy.prompt(KING)
    assert earlier.tokenize(prompt)[:2] == ["P: ", "⟨a8⟩·"]
    assert Words(earlier).prompt(prompt) == earlier(prompt).input_ids
    assert Words(tokenizer).prompt(prompt) == tokenizer(prompt).input_ids


def test_a_list_of_legal_moves_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    """Three legal moves, each once, each as likely as the others that are left."""
    asked = wanted(legal_tree(RECORD, Words(tokenizer), random.Random(0)).arrays(), tokenizer)
    longest = max(asked, key=len)
    assert [longest[i : i + 3] for i in range(0, len(longest), 5)] == [" a1"] * 3
    (first, second), left = (longest[i : i + 2] for i in (3, 8)), {"a2", "b1", "b2"}
    assert asked == {
        "": {" a1": 1.0},
        " a1": pytest.approx(dict.fromkeys(left, 1 / 3)),
        f" a1{first}": {" a1": 1.0},
        f" a1{first} a1": dict.fromkeys(left - {first}, 0.5),
        f" a1{first} a1{second}": {" a1": 1.0},
        longest: dict.fromkeys(left - {first, second}, 1.0),
    }


@pytest.mark.parametrize("build", [build_nano_tokenizer, build_gpt2_tokenizer])
def test_what_is_read_is_right(build: Any) -> None:
    """Each way down to a leaf reads as a row: legal distinct moves with an eval each, or the truth of a move."""
    tokenizer = build()
    words, dice = Words(tokenizer), random.Random(1)
    for record in records(3)[::5]:
        tree = policy_tree(record, words, dice).arrays()
        (last,) = [n for n, t in zip(tree["nodes"], tree["tokens"], strict=True) if t == tokenizer.eos_token_id]
        path = [node for node in range(last + 1) if tree["ends"][node] > last]
        output = policy.parse(tokenizer.decode(tree["input_ids"][path]).removeprefix(policy.prompt(record["fen"])))
        assert sorted(output.moves) == sorted(record["moves"])
        assert len(output.evals) == len(output.moves)
        assert output.best == record["moves"][0]
        tree = environment_tree(record, words, dice).arrays()
        ends = [n for n, t in zip(tree["nodes"], tree["tokens"], strict=True) if t == tokenizer.eos_token_id]
        assert 1 <= len(ends) == tree["rows"] <= 2
        for last in ends:
            path = [node for node in range(last + 1) if tree["ends"][node] > last]
            text = tokenizer.decode(tree["input_ids"][path])
            start = environment.completion_start(text)
            asked = environment.parse_prompt(text[:start])
            answer = environment.parse(text[start:])
            assert answer == environment.transition(asked.fen, asked.move)
            assert split_of(answer.fen) == "train"


def test_positions_are_of_train_and_come_once(tmp_path: Path) -> None:
    found = records(12)
    shards = [write(tmp_path, "positions-0.parquet", found[:150]), write(tmp_path, "positions-1.parquet", found[100:])]
    positions, digest = read_positions(shards)
    fens = [fen.rsplit(" ", 2)[0] for fen in positions["fen"].to_pylist()]
    assert len(set(fens)) == len(fens)
    assert set(fens) == {each["fen"].rsplit(" ", 2)[0] for each in found if split_of(each["fen"]) == "train"}
    write(tmp_path, "positions-1.parquet", found[101:])
    assert read_positions(shards)[1] != digest


def mirror_of_move(uci: str) -> str:
    move = chess.Move.from_uci(uci)
    squares = map(chess.square_mirror, (move.from_square, move.to_square))
    return chess.Move(*squares, promotion=move.promotion).uci()


def test_a_twin_is_the_mirrored_board() -> None:
    """Against python-chess, over castling rights, en passant, promotions and either side to move."""
    fens = [
        "r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w Kq - 3 17",
        "4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 2",
        "8/P6k/8/8/8/8/p6K/8 b - - 12 60",
    ]
    rows = records(6)[::7] + [{"fen": fen, "history": "e1e2 e8e7", "cp": [1, 0]} for fen in fens]
    for row in rows:
        board = chess.Board(row["fen"])
        record = {"moves": [move.uci() for move in board.legal_moves], **row, "game": 4}
        record["played"] = record["moves"][0]
        twin = mirrored(record)
        assert twin["fen"] == board.mirror().fen()
        assert {*twin["moves"]} <= {move.uci() for move in board.mirror().legal_moves}
        assert twin["moves"] == [mirror_of_move(move) for move in record["moves"]]
        assert twin["history"] == " ".join(mirror_of_move(move) for move in record["history"].split())
        assert (twin["played"], twin["cp"], twin["game"]) == (mirror_of_move(record["played"]), record["cp"], 4)
        assert mirrored(twin) == record


def test_twins_are_new_and_of_train(tmp_path: Path) -> None:
    """A position whose twin is there has none, nor one whose twin belongs to dev or test."""
    found = [record for record in records(12) if split_of(record["fen"]) == "train"]
    found.append(mirrored(found[40]))
    positions, _ = read_positions([write(tmp_path, "positions-0.parquet", found)])
    columns = positions.column_names
    twins = with_twins(positions).to_pylist()[len(positions) :]
    own = {position_key(fen) for fen in positions["fen"].to_pylist()}
    of_each = [mirrored(record) for record in positions.to_pylist()]
    held_out = [twin for twin in of_each if split_of(twin["fen"]) != "train"]
    assert held_out, "else the test says nothing"
    assert twins == [
        {name: twin[name] for name in columns}
        for twin in of_each
        if twin not in held_out and position_key(twin["fen"]) not in own
    ]
    assert 0 < len(twins) <= len(positions) - len(held_out) - 2


def test_batches_take_turns_and_are_the_same_in_every_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    positions, _ = read_positions([write(tmp_path, "positions-0.parquet", records(3))])
    trees = position_trees(positions, Words(tokenizer), batch_size=4, seed=3)
    assert len(trees) == len(positions) // 8 * 12
    prompts = [tokenizer.decode(tree["input_ids"][:1]) for tree in trees]
    assert prompts == ["P: "] * 8 + ["A: "] * 4 + prompts[:-12]
    again = position_trees(positions, Words(tokenizer), batch_size=4, seed=3)
    assert all((trees[7][name] == again[7][name]).all() for name in ("input_ids", "ends", "tokens", "weights"))
    read = [tuple(trees[i]["input_ids"][:70]) for i in range(len(trees)) if i % 12 < 8]
    assert len(set(read)) == len(read), "each position gives one P: row"
    listed = position_trees(positions, Words(tokenizer), batch_size=4, seed=3, legal_lists=0.5)
    tasks = [tokenizer.decode(tree["input_ids"][:1]) for tree in listed]
    assert 0.3 < tasks.count("L: ") / (len(listed) * 2 / 3) < 0.7
    assert tasks[8:12] == ["A: "] * 4
