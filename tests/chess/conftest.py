"""A handful of rows whose truth is known by hand, and completions with known faults."""

from typing import Any

import pytest

START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
AFTER_E4 = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"
BEFORE_MATE = "rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq - 0 2"  # fool's mate: Qh4
AFTER_MATE = "rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3"
FIVE_MOVES = "7k/7p/8/8/8/8/K7/8 w - - 0 1"
SIX_MOVES = "8/8/8/k7/8/7p/8/7K b - - 0 1"


def environment_row(fen: str, move: str, target: str, stratum: str) -> dict[str, Any]:
    return {
        "prompt": f"A: {fen}+{move}+{move}+",
        "task": "environment",
        "target": target,
        "legal_moves": [],
        "legal_cp": [],
        "stratum": stratum,
    }


def policy_row(fen: str, values: dict[str, int], target: str, stratum: str) -> dict[str, Any]:
    moves = sorted(values)
    return {
        "prompt": f"P: {fen}",
        "task": "policy",
        "target": target,
        "legal_moves": moves,
        "legal_cp": [values[move] for move in moves],
        "stratum": stratum,
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Three A: rows (legal, mate, illegal) and two P: rows (White with five moves, Black with six; values made up)."""
    white = {"a2b3": 40, "a2b2": 35, "a2a3": 30, "a2b1": 20, "a2a1": -60}
    black = {"a5b4": 9999, "a5b5": 50, "a5b6": 40, "a5a4": 30, "a5a6": 20, "h3h2": -200}
    return [
        environment_row(START, "e2e4", f"{AFTER_E4}+0.001+0+0", "quiet"),
        environment_row(BEFORE_MATE, "d8h4", f"{AFTER_MATE}+1.0+1+0", "mate"),
        environment_row(START, "e2e5", f"{START}+-1.0+0+1", "illegal"),
        policy_row(FIVE_MOVES, white, " M: a2b3 a2b2 a2a3 a2b1 a2a1 E: 0.4 0.4 0.3 0.2 -0.6 B: a2b3", "endgame"),
        policy_row(SIX_MOVES, black, " M: a5b4 a5b5 a5b6 a5a4 a5a6 E: 1000.0 0.5 0.4 0.3 0.2 B: a5b4", "endgame"),
    ]


@pytest.fixture
def gold(rows: list[dict[str, Any]]) -> list[str]:
    return [row["target"] for row in rows]
