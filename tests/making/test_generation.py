"""Positions by self-play and rows made from them."""

import json
import random
from collections import Counter
from pathlib import Path

import chess
import pyarrow.parquet as pq
import pytest

from recipes.making import generation, moves
from recipes.making.generation import GameSettings, generate_positions, read_lines
from recipes.making.moves import environment_rows
from rookworld_trl.chess import environment
from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.policy import policy_completion
from tests.support.stockfish import requires_stockfish

SETTINGS = GameSettings(seed=3, nodes=200, max_plies=12, games_per_shard=2)


def run(directory, shards, settings=SETTINGS, workers=1):
    return dict(generate_positions(directory, shards, settings, workers))


@requires_stockfish
def test_rows_are_true_and_the_same_whatever_the_workers_and_interruptions(tmp_path):
    run(tmp_path / "one", range(2))
    run(tmp_path / "two", range(1, 2), workers=2)  # as if the first shard had been lost
    run(tmp_path / "two", range(2), workers=2)
    for shard in range(2):
        first = pq.read_table(generation.shard_path(tmp_path / "one", shard))
        assert first.num_rows > 0
        assert first.equals(pq.read_table(generation.shard_path(tmp_path / "two", shard)))
        for record in first.to_pylist():
            legal = {move.uci() for move in chess.Board(record["fen"]).legal_moves}
            assert {*record["moves"], record["played"]} <= legal
            assert len(record["moves"]) == len(record["cp"]) == min(5, len(legal))
            assert record["cp"] == sorted(record["cp"], reverse=True)


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


def test_candidates_stand_in_random_order_and_the_best_is_the_one_of_the_highest_eval():
    moves, values = ["g1f3", "e2e4", "b1c3", "d2d4", "c2c4", "a2a3"], [30, 25, -5, 40, 20, -100]
    places, orders = Counter(), set()
    for seed in range(400):
        words = policy_completion(moves, values, random.Random(seed)).split()
        assert (words[0], words[6], words[12]) == ("M:", "E:", "B:")
        listed, evals = words[1:6], words[7:12]
        written = {"g1f3": "0.30", "e2e4": "0.25", "b1c3": "-0.05", "d2d4": "0.40", "c2c4": "0.20"}
        assert dict(zip(listed, evals, strict=True)) == written
        assert words[13] == "d2d4"
        orders.add(tuple(listed))
        places[listed.index("d2d4")] += 1
    assert len(orders) > 100  # of 120
    assert min(places.values()) > 50
    assert len(places) == 5  # the best one at every place alike: 80 times each, give or take 8
    for seed in range(20):  # of equals the first listed, which the text itself tells
        words = policy_completion(["a2a3", "b2b3"], [7, 7], random.Random(seed)).split()
        assert words[-1] == words[1]


ILLEGAL = {
    "pinned": (
        "4k3/4r3/8/8/8/8/4B3/4K3 w - - 0 1",
        {"e2d1", "e2f1", "e2d3", "e2c4", "e2b5", "e2a6", "e2f3", "e2g4", "e2h5"},
    ),
    "into_check": ("4k3/8/8/8/8/8/1r6/4K3 w - - 0 1", {"e1d2", "e1e2", "e1f2"}),
    "leaves_check": ("4k3/4r3/8/8/8/8/P7/4K3 w - - 0 1", {"a2a3", "a2a4"}),
    "castling": ("r3k2r/8/8/8/8/5r2/8/R3K2R w KQ - 0 1", {"e1g1"}),  # through f1
    "missing_promotion": ("7k/P7/8/8/8/8/8/K7 w - - 0 1", {"a7a8"}),
    "wrong_promotion": ("7k/8/8/8/8/P7/8/K7 w - - 0 1", {"a3a4q", "a1a2q", "a1b2n"}),
    "wrong_pawn": ("7k/8/8/8/3p4/3P4/8/K7 w - - 0 1", {"d3d4", "d3d5", "d3c4", "d3e4", "d3d2"}),
    "empty_square": ("7k/8/8/8/8/8/8/K7 w - - 0 1", {"d4d5", "d4e6", "a2h2"}),
    "wrong_colour": ("7k/8/8/8/8/8/8/K7 w - - 0 1", {"h8g8", "h8g7", "h8h7"}),
    "own_man": ("7k/8/8/8/8/8/PP6/KN6 w - - 0 1", {"a1a2", "a1b1", "a1b2"}),
    "jump": ("7k/8/8/8/8/P7/8/R6K w - - 0 1", {"a1a4", "a1a8"}),
    "geometry": ("7k/8/8/8/8/8/8/KN6 w - - 0 1", {"b1b2", "a1c3"}),
}


def test_every_kind_of_illegal_move_by_hand():
    whole = ("pinned", "into_check", "leaves_check", "castling", "missing_promotion", "wrong_colour", "own_man")
    for kind, (fen, some) in ILLEGAL.items():
        found = set(moves.ILLEGAL_KINDS[kind](chess.Board(fen)))
        assert some == found if kind in whole else some <= found, kind
        rng = random.Random(0)
        assert any(moves.illegal_move(chess.Board(fen), rng) in found for _ in range(100)), f"{kind} is drawn"


def test_illegal_moves_are_illegal_and_well_formed_whatever_the_position():
    rng = random.Random(0)
    boards = [generation.random_endgame(rng) for _ in range(150)]
    for _ in range(3):
        board = chess.Board()
        while not board.is_game_over() and board.ply() < 100:
            boards.append(board.copy(stack=False))
            board.push(rng.choice(list(board.legal_moves)))
    for board in boards:
        for found in map(list, (find(board) for find in moves.ILLEGAL_KINDS.values())):
            for move in [*rng.sample(found, min(3, len(found))), moves.illegal_move(board, rng)]:
                assert environment.transition(board.fen(), move).truncated, (board.fen(), move)
                assert environment.parse_prompt(environment.prompt(board.fen(), move, [])).move == move


GAME = ["e2e4", "e7e5", "g1f3", "b8c6", "f1b5", "a7a6", "b5a4", "g8f6", "e1g1", "f8e7", "f1e1", "b7b5", "a4b3"]


def test_rows_of_a_position_are_true_and_of_different_moves():
    """Of each position of a short game, many times. The seventy-five-move rule ends games, the fifty-move rule not."""
    board, rows, ended, claimable = chess.Board(), [], 0, 0
    for ply, move in enumerate(GAME):
        record = {"fen": board.fen(), "history": " ".join(GAME[max(0, ply - 9) : ply]), "played": move}
        rows += [environment_rows(record, 6, seed % 2 == 0, random.Random(seed)) for seed in range(30)]
        board.push_uci(move)
    for of_position in rows:
        given = [environment.parse_prompt(row["prompt"]) for row in of_position]
        assert 1 < len(given) == len({each.move for each in given}) <= 7
        for row, each in zip(of_position, given, strict=True):
            answer = environment.parse(row["completion"])
            assert answer == environment.transition(each.fen, each.move)
            assert row["after"] == answer.fen
            assert board_from_fen(each.fen)
            clock = int(answer.fen.split()[4])
            ended += clock == 150 and (answer.reward, answer.terminated) == (0.5, True)
            claimable += 100 <= clock < 150 and (answer.reward, answer.terminated) == (0.001, False)
    assert ended >= 3
    assert claimable >= 3


def test_openings_are_read_as_moves_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "openings.tsv"
    file.write_text("eco\tname\tpgn\nA00\tAmar\t1. Nh3 d5 2. g3\nC50\tItalian\t1. e4 e5 2. Nf3 Nc6 3. Bc4\n")
    assert read_lines(file) == [("g1h3", "d7d5", "g2g3"), ("e2e4", "e7e5", "g1f3", "b8c6", "f1c4")]
    file.write_text("eco\tname\tpgn\nA00\tBroken\t1. Nh3 d5 2. Ke5\n")
    with pytest.raises(ValueError, match="line 2, field 'pgn'"):
        read_lines(file)
    file.write_text("a,b\n")
    with pytest.raises(ValueError, match="no column 'pgn'"):
        read_lines(file)
