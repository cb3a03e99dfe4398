"""The shipped rows: their truth scores 1.0 in both forms, in hundredths and padded too, as RookWorld's rows have it."""

import math
from typing import Any

import pytest

from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.policy import PADDED, format_completion, parse
from rookworld_trl.chess.rewards import score_environment, score_policy


@pytest.fixture(scope="module", params=["train", "dev", "test"])
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return list(load_shipped(request.param))


def pawns(centipawns: int) -> float:
    """A mate in n plies stands as 1000 pawns less n hundredths."""
    return centipawns / 100 if abs(centipawns) < 9000 else math.copysign(900, centipawns) + centipawns / 100


def test_every_truth_scores_one(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["task"] == "environment":
            score: Any = score_environment(row["prompt"], row["target"], row["target"])
            assert (score.reward, score.continuous) == (1.0, 1.0), row["prompt"]
            continue
        values = dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
        gold = parse(row["target"])
        evals = [f"{pawns(values[move]):.2f}" for move in gold.moves]
        for text in (row["target"], format_completion(list(gold.moves), evals, gold.best, PADDED)):
            score = score_policy(text, row["legal_moves"], row["legal_cp"])
            assert (score.reward, score.continuous) == (1.0, pytest.approx(1.0, abs=1e-9)), row["prompt"]
