"""The shipped data's builder on small folders without an engine: no position or game in two splits, strata filled."""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import chess
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.making import shipping, transitions
from recipes.making.generation import POSITION_SCHEMA, GameSettings, held_out_records, shard_path
from recipes.making.shipping import Sources, choose_rows
from recipes.making.trees import read_positions
from rookworld_trl.chess import environment, position_key
from rookworld_trl.chess.dataset import split_by_hash

OPENINGS = (
    "eco\tname\tpgn\nC60\tSpanish\t1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6\nD06\tQueen's\t1. d4 d5 2. c4 e6 3. Nc3\n"
)


def folder(path: Path, seed: int, held_out: bool) -> Path:
    """Positions of random games."""
    rng, records = random.Random(seed), []
    for game in range(12 if held_out else 4):
        board = chess.Board()
        while not board.is_game_over() and board.ply() < 120:
            if held_out:
                records += held_out_records(board, "test" if game % 2 else "dev", game, rng)
            else:
                history = " ".join(move.uci() for move in board.move_stack[-9:])
                records.append({"fen": board.fen(), "history": history, "moves": [], "cp": [], "played": ""})
                records[-1]["game"] = game
            board.push(rng.choice(list(board.legal_moves)))
    path.mkdir()
    (path / "settings.json").write_text(json.dumps(asdict(GameSettings(seed=seed, held_out=held_out))))
    pq.write_table(pa.Table.from_pylist(records, schema=POSITION_SCHEMA), shard_path(path, 0))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    (root / "openings.tsv").write_text(OPENINGS)
    return Sources(folder(root / "a", 1, False), folder(root / "b", 2, True), str(root / "openings.tsv"))


@pytest.fixture(scope="module")
def rows(sources: Sources) -> dict[str, list[dict[str, str]]]:
    with pytest.MonkeyPatch.context() as patch:
        few = {"human_opening": 3, "opening": 6, "middlegame": 16, "endgame": 8}
        patch.setattr(shipping, "POLICY_ROWS", dict.fromkeys(("train", "dev", "test"), few))
        patch.setattr(transitions, "ROWS", 8)
        patch.setattr(transitions, "MANY", {"illegal": 12})
        patch.setattr(transitions, "EXTRA", 60)
        patch.setattr(transitions, "FIRST_GAMES", 500)
        again = [choose_rows(sources, 0), choose_rows(sources, 0)]
    assert again[0] == again[1]
    return again[0]


def positions(rows: list[dict[str, str]]) -> set[str]:
    shown = {position_key(row["fen"]) for row in rows}
    answers = [environment.transition(row["fen"], row["move"]).fen for row in rows if row["task"] == "environment"]
    return shown | set(map(position_key, answers))


def test_no_position_and_no_game_stands_in_two_splits(rows: dict[str, list[dict[str, str]]]) -> None:
    shown = {split: positions(rows[split]) for split in rows}
    games = {split: {row["game"] for row in rows[split] if row["game"]} for split in rows}
    played = {split: {game for game in games[split] if not game.startswith("opening:")} for split in rows}
    for one, two in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not shown[one] & shown[two]
        assert not played[one] & played[two]
    of_folders = {split: {game for game in games if not game.startswith("random:")} for split, games in played.items()}
    assert of_folders["train"] <= {f"1:{game}" for game in range(4)}
    assert of_folders["test"] <= {f"2:{game}" for game in range(1, 12, 2)}
    for split, found in rows.items():
        assert {split_by_hash(row["fen"]) for row in found} == {split}
        keys = [position_key(row["fen"]) for row in found]
        assert len(keys) == len(set(keys))


def test_no_held_out_answer_is_a_position_of_the_training_folder(
    rows: dict[str, list[dict[str, str]]], sources: Sources, tmp_path: Path
) -> None:
    trained = {position_key(fen) for fen in pq.read_table(shard_path(sources.positions, 0))["fen"].to_pylist()}
    shipping.write_held_out(tmp_path, {split: positions(rows[split]) for split in ("dev", "test")})
    listed = set(pq.read_table(tmp_path / "held_out_answers.parquet")["position"].to_pylist())
    for split in ("dev", "test"):
        held = [row for row in rows[split] if row["stratum"] != "illegal"]
        for key in positions(held):
            assert key not in trained
            assert split_by_hash(f"{key} 0 1") != "train" or shipping.position_number(f"{key} 0 1") in listed


def test_strata_say_what_the_moves_do(rows: dict[str, list[dict[str, str]]]) -> None:
    found = [row for row in rows["test"] if row["task"] == "environment"]
    counts = Counter(row["stratum"] for row in found)
    assert counts["quiet"] >= 2
    assert set(counts.values()) <= set(range(13))
    for name in ("illegal", "seventyfive_moves", "fifty_moves", "repetition", "first_moves", "check", "capture"):
        assert counts[name] >= 3, name
    for row in found:
        history = row["history"].split()
        truth = environment.transition(row["fen"], row["move"])
        clock = int(truth.fen.split()[4])
        assert (row["stratum"] == "illegal") == truth.truncated
        if row["stratum"] == "seventyfive_moves":
            assert (clock, truth.reward, truth.terminated) == (150, 0.5, True)
        elif row["stratum"] == "fifty_moves":
            assert 100 <= clock < 150
            assert not truth.terminated  # nobody claims
        elif row["stratum"] == "repetition":
            assert clock < 100
            assert not truth.terminated
            board = chess.Board(row["fen"])  # where the eight moves began, too: there and back, twice
            assert len(history) == 8
            for move in (*history, row["move"]):
                board.push_uci(move)
            assert board.is_repetition(3)
        elif row["stratum"] == "first_moves":
            assert len(history) == chess.Board(row["fen"]).ply() <= 7
        elif row["stratum"] in ("mate", "stalemate", "dead_material"):
            assert truth.terminated
    shown = Counter(len(row["history"].split()) + 1 for row in found if row["game"].startswith("2:"))
    assert {1, 2, 5, 10} <= set(shown)


def test_a_held_out_folder_gives_no_rows_to_a_training_that_reads_it(sources: Sources) -> None:
    assert len(read_positions([shard_path(sources.held_out, 0)])[0]) == 0
    assert len(read_positions([shard_path(sources.positions, 0)])[0]) > 0


def test_values_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def value(fens: list[str], nodes: int) -> list[list[int] | None]:
        asked.extend(fens)
        return [[len(fen), nodes] for fen in fens]

    monkeypatch.setattr(shipping, "value_every_move", value)
    monkeypatch.setattr(shipping, "ProcessPoolExecutor", ThreadPoolExecutor)  # which sees what is patched
    rows = [{"fen": f"fen {i}"} for i in range(120)]
    memory = tmp_path / "values.jsonl"
    assert list(shipping.value_rows(rows[:60], 7, memory, 1)) == [0, 50, 10]
    assert list(shipping.value_rows(rows, 7, memory, 1)) == [60, 50, 10]
    assert len(asked) == len(set(asked)) == 120
    assert [row["cp"] for row in rows] == [[len(row["fen"]), 7] for row in rows]
    assert next(shipping.value_rows(rows, 8, memory, 1)) == 0  # of other nodes: searched again


def test_few_rows_are_kept_in_which_nothing_is_at_stake() -> None:
    """Half of the endgames offer equal moves: a tenth of those kept do. Missing human openings become middlegames."""
    rows = [
        {"stratum": stratum, "cp": [0, 0] if even else [0, 90]}
        for _ in range(60)
        for stratum, even in (("endgame", True), ("endgame", False), ("middlegame", False))
    ]
    rows += [{"stratum": "human_opening", "cp": [5, 90]}] * 4 + [{"stratum": "endgame", "cp": None}]
    kept = shipping.keep_policy_rows(rows, {"human_opening": 6, "middlegame": 20, "endgame": 40})
    assert Counter((row["stratum"], row["cp"] == [0, 0]) for row in kept) == {
        ("endgame", True): 4,
        ("endgame", False): 36,
        ("middlegame", False): 22,
        ("human_opening", False): 4,
    }
