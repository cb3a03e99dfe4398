"""Positions by self-play and rows made from them."""

import json
import random

import chess
import pyarrow.parquet as pq
import pytest

from rookworld_trl.data import generation, strata
from rookworld_trl.data.generation import GameSettings, generate_positions, read_openings
from rookworld_trl.data.splits import split_of
from rookworld_trl.data.supervised import policy_completion, supervised_rows
from rookworld_trl.tasks import environment, policy
from tests.support.stockfish import requires_stockfish

SETTINGS = GameSettings(seed=3, nodes=200, max_plies=12, games_per_shard=2)


def run(directory, shards, settings=SETTINGS, workers=1):
    return dict(generate_positions(directory, shards, settings, workers))


@requires_stockfish
def test_same_seed_same_rows_whatever_the_workers_and_interruptions(tmp_path):
    run(tmp_path / "one", range(2))
    run(tmp_path / "two", range(1, 2), workers=2)  # as if the first shard had been lost
    run(tmp_path / "two", range(2), workers=2)
    for shard in range(2):
        first = pq.read_table(generation.shard_path(tmp_path / "one", shard))
        assert first.num_rows > 0
        assert first.equals(pq.read_table(generation.shard_path(tmp_path / "two", shard)))


@requires_stockfish
def test_resuming_leaves_finished_shards_alone_and_refuses_other_settings(tmp_path):
    run(tmp_path, range(1))
    before = generation.shard_path(tmp_path, 0).stat().st_mtime_ns
    assert run(tmp_path, range(1)) == {}
    assert generation.shard_path(tmp_path, 0).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="made with other settings"):
        run(tmp_path, range(1), GameSettings(seed=4))
    stamp = tmp_path / "settings.json"  # as one that was written before a setting existed
    stamp.write_text(json.dumps({k: v for k, v in json.loads(stamp.read_text()).items() if k != "check_share"}))
    assert run(tmp_path, range(1)) == {}


@requires_stockfish
def test_check_share_makes_positions_in_check(tmp_path):
    def in_check(check_share):
        directory = tmp_path / str(check_share)
        settings = GameSettings(seed=1, nodes=50, max_plies=60, games_per_shard=6, check_share=check_share)
        run(directory, range(1), settings)
        fens = pq.read_table(generation.shard_path(directory, 0))["fen"].to_pylist()
        return sum(chess.Board(fen).is_check() for fen in fens) / len(fens)

    assert in_check(1.0) > 2 * in_check(0.0)


@requires_stockfish
def test_records_are_true(tmp_path):
    run(tmp_path, range(1))
    for record in pq.read_table(generation.shard_path(tmp_path, 0)).to_pylist():
        board = chess.Board(record["fen"])
        legal = {move.uci() for move in board.legal_moves}
        assert set(record["moves"]) <= legal
        assert len(record["moves"]) == len(record["cp"]) == min(5, len(legal))
        assert record["cp"] == sorted(record["cp"], reverse=True)
        assert record["played"] in legal


@requires_stockfish
def test_supervised_rows_parse_and_hold_no_held_out_position(tmp_path):
    run(tmp_path, range(1), GameSettings(seed=1, nodes=100, max_plies=60, games_per_shard=4))
    rows = list(
        supervised_rows(
            [generation.shard_path(tmp_path, 0)], seed=0, environment_share=1.0, listing_share=0.5, check_share=1.0
        )
    )
    for row in rows:
        if row["prompt"].startswith("P: "):
            assert split_of(policy.parse_prompt(row["prompt"])) == "train"
            output = policy.parse(row["completion"])
            assert output.best in output.moves
            assert list(output.moves) == sorted(output.moves)
            assert row["task"] == "policy"
        elif row["prompt"].startswith("L: "):
            board = chess.Board(row["prompt"].removeprefix("L: "))
            assert split_of(board.fen()) == "train"
            assert row["completion"].split() == ["M:", *sorted(move.uci() for move in board.legal_moves)]
            assert row["task"] == "listing"
        else:
            given = environment.parse_prompt(row["prompt"])
            truth = environment.transition(given.fen, given.move)
            assert environment.parse(row["completion"]) == truth
            assert split_of(given.fen) == split_of(truth.fen) == "train"
    assert {row["prompt"][0] for row in rows} == {"P", "A", "L"}


def test_candidates_stand_in_uci_order_or_the_best_first():
    moves, values = ["g1f3", "e2e4", "b1c3", "d2d4", "c2c4", "a2a3"], [30, 25, -5, 40, 20, -100]
    completion = policy_completion(moves, values)
    assert completion.split()[1:6] == ["b1c3", "c2c4", "d2d4", "e2e4", "g1f3"]
    assert completion.split()[7:12] == list(map(policy.format_eval, (-5, 20, 40, 25, 30)))
    assert completion.endswith(" B: d2d4")
    first = policy_completion(moves, values, best_first=True)
    assert first.split()[1:6] == ["d2d4", "b1c3", "c2c4", "e2e4", "g1f3"]
    assert first.split()[7:12] == list(map(policy.format_eval, (40, -5, 20, 25, 30)))


def test_openings_are_read_as_moves_and_errors_name_the_line(tmp_path):
    file = tmp_path / "openings.tsv"
    file.write_text("eco\tname\tpgn\nA00\tAmar\t1. Nh3 d5 2. g3\nC50\tItalian\t1. e4 e5 2. Nf3 Nc6 3. Bc4\n")
    assert read_openings(file) == [("g1h3", "d7d5", "g2g3"), ("e2e4", "e7e5", "g1f3", "b8c6", "f1c4")]
    file.write_text("eco\tname\tpgn\nA00\tBroken\t1. Nh3 d5 2. Ke5\n")
    with pytest.raises(ValueError, match="line 2, field 'pgn'"):
        read_openings(file)
    file.write_text("a,b\n")
    with pytest.raises(ValueError, match="no column 'pgn'"):
        read_openings(file)


STRATA = [
    (chess.STARTING_FEN, "g1f3", "quiet"),
    (chess.STARTING_FEN, "e2e5", "illegal"),
    ("rnbqkbnr/ppp1pppp/8/3p4/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2", "e4d5", "capture"),
    ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", "e1g1", "castle_king"),
    ("r3k2r/8/8/8/8/8/8/R3K2R b KQkq - 0 1", "e8c8", "castle_queen"),
    ("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 2", "e5d6", "en_passant"),
    ("8/P6k/8/8/8/8/8/K7 w - - 0 1", "a7a8r", "promotion"),
    ("4k3/8/8/8/8/8/8/4K2R w K - 0 1", "h1h8", "check"),
    ("6k1/5ppp/8/8/8/8/8/R3K3 w Q - 0 1", "a1a8", "mate"),
    ("7k/5K2/8/6Q1/8/8/8/8 w - - 0 1", "g5g6", "stalemate"),
    ("8/8/8/8/8/2k5/1q6/K7 w - - 0 1", "a1b2", "illegal"),
    ("8/8/8/8/8/4k3/1q6/K7 w - - 0 1", "a1b2", "draw"),  # only the kings are left
    ("4k3/8/8/8/8/8/8/R3K3 w - - 149 120", "a1a2", "draw"),  # the 75-move rule
]


@pytest.mark.parametrize(("fen", "move", "kind"), STRATA)
def test_strata_by_hand(fen, move, kind):
    board = chess.Board(fen)
    assert strata.stratum(board, move) == kind
    assert board.fen() == chess.Board(fen).fen()


def test_illegal_moves_are_illegal_and_well_formed():
    rng = random.Random(0)
    for fen in ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", chess.STARTING_FEN, "4k3/4r3/8/8/8/8/4B3/4K3 w - - 0 1"):
        board = chess.Board(fen)
        for _ in range(50):
            move = strata.illegal_move(board, rng)
            assert environment.transition(fen, move).truncated
            assert environment.parse_prompt(environment.prompt(fen, move, [])).move == move


def test_endgames_are_legal_and_not_over():
    for seed in range(30):
        board = generation.random_endgame(random.Random(seed))
        assert board.is_valid()
        assert any(board.legal_moves)
