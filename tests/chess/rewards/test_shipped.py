"""The shipped rows: their truth scores 1.0 in both forms, and what earlier rewards paid for stays at the bottom."""

import math
from typing import Any

import pytest

from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.policy import PADDED, format_completion, parse
from rookworld_trl.chess.rewards import score_environment, score_policy


@pytest.fixture(scope="module", params=["train", "dev", "test"])
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return list(load_shipped(request.param))


def test_every_truth_scores_one(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["task"] == "policy":
            score: Any = score_policy(row["target"], row["legal_moves"], row["legal_cp"])
            assert score.evals_score == 1.0, row["prompt"]
        else:
            score = score_environment(row["prompt"], row["target"], row["target"])
        assert (score.reward, score.continuous) == (1.0, 1.0), row["prompt"]


def test_the_truth_in_hundredths_scores_one(rows: list[dict[str, Any]]) -> None:
    """RookWorld's rows have two decimals and padding."""
    for row in rows:
        if row["task"] == "policy":
            values = dict(zip(row["legal_moves"], row["legal_cp"], strict=True))
            gold = parse(row["target"])
            evals = [f"{pawns(values[move]):.2f}" for move in gold.moves]
            completion = format_completion(list(gold.moves), evals, gold.best, PADDED)
            score = score_policy(completion, row["legal_moves"], row["legal_cp"])
            assert score.reward == 1.0, row["prompt"]
            assert score.continuous == pytest.approx(1.0, abs=1e-9), row["prompt"]


def pawns(centipawns: int) -> float:
    """A mate in n plies stands as 1000 pawns less n hundredths."""
    return centipawns / 100 if abs(centipawns) < 9000 else math.copysign(900, centipawns) + centipawns / 100


def test_stored_truth_is_the_computed_truth(rows: list[dict[str, Any]]) -> None:
    for row in rows[::5]:
        if row["task"] == "environment":
            assert score_environment(row["prompt"], row["target"]).exact, row["prompt"]


def test_no_cheat_rises_above_the_bottom(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, completion in _cheats(row).items():
            if row["task"] == "policy":
                score: Any = score_policy(completion, row["legal_moves"], row["legal_cp"])
            else:
                score = score_environment(row["prompt"], completion, row["target"])
            assert score.reward <= 0.2, (name, row["prompt"])
            assert score.continuous <= 0.2, (name, row["prompt"])


def _cheats(row: dict[str, Any]) -> dict[str, str]:
    target = row["target"]
    found = {"empty": "", "echo": row["prompt"], "echo and truth": row["prompt"] + target, "twice": target + target}
    if row["task"] == "environment":
        fen = row["prompt"].removeprefix("A: ").split("+")[0]
        other = fen.replace(" w ", " b ") if " w " in fen else fen.replace(" b ", " w ")
        found |= {"copied": f"{fen}+0.001+0+0", "copied, side flipped": f"{other}+0.001+0+0"}
        if row["stratum"] != "illegal":
            truth, flags = target.split("+", 1)
            rest = truth.split(" ", 1)[1]
            found |= {"copied, right flags": f"{fen}+{flags}", "copied squares": f"{fen.split()[0]} {rest}+{flags}"}
        return found
    gold = parse(target)
    if len(gold.moves) > 1:  # a best move that is in no list, or in no game
        found["nothing legal"] = format_completion(["a1a1"] * len(gold.moves), ["0.0"] * len(gold.moves), "a1a1")
    return found
