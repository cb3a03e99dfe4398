"""TRL's side of the rewards: routing by prompt, column checks, and the numbers of the scorers."""

from typing import Any

import chess
import pytest

from rookworld_trl.chess import rewards

P_PROMPT = "P: 7k/8/8/8/8/8/8/K7 w - - 0 1"
P_MOVES, P_CP = ["a1a2", "a1b1", "a1b2"], [300, 0, -300]
P_GOLD = " M: a1a2 a1b1 a1b2 E: 3.0 0.0 -3.0 B: a1a2"
A_PROMPT = f"A: {chess.STARTING_FEN}+e2e4+e2e4+"
A_GOLD = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1+0.001+0+0"
A_COPY = f"{chess.STARTING_FEN}+0.001+0+0"

POLICY = [rewards.policy_reward, rewards.policy_reward_continuous]
ENVIRONMENT = [rewards.environment_reward, rewards.environment_reward_continuous]


def batch() -> dict[str, Any]:
    """Two rows of each task, as TRL hands them over, its own extras among the columns."""
    return {
        "prompts": [P_PROMPT, A_PROMPT, P_PROMPT, A_PROMPT],
        "completions": [P_GOLD, A_GOLD, "nonsense", A_COPY],
        "completion_ids": [[1], [2], [3], [4]],
        "legal_moves": [P_MOVES, [], P_MOVES, []],
        "legal_cp": [P_CP, [], P_CP, []],
        "target": [P_GOLD, A_GOLD, P_GOLD, A_GOLD],
        "trainer_state": object(),
    }


@pytest.mark.parametrize("function", POLICY)
def test_policy_rows_are_scored_and_others_left_out(function: Any) -> None:
    assert function(**batch()) == [1.0, None, -0.3, None]


def test_environment_rows_are_scored_and_others_left_out() -> None:
    assert rewards.environment_reward(**batch()) == [None, 1.0, None, 0.2]
    assert rewards.environment_reward_continuous(**batch()) == [None, 1.0, None, 0.0]


BAD: dict[str, tuple[list[Any], str, Any, str]] = {
    **{
        f"no {column}": (functions, column, None, f"column '{column}' is missing")
        for functions, column in ((POLICY, "legal_moves"), (POLICY, "legal_cp"), (ENVIRONMENT, "target"))
    },
    **{
        f"{column} short": (functions, column, slice(1), f"'{column}'.*, row .: list index out of range")
        for functions, column in ((POLICY, "legal_moves"), (POLICY, "legal_cp"), (ENVIRONMENT, "target"))
    },
    "too few values": (POLICY, "legal_cp", (2, [1, 2]), r"'legal_cp', row 2: .* 2 values for 3 legal moves"),
    "no moves": (POLICY, "legal_moves", (0, None), "'legal_cp', row 0"),
    "a broken target": (ENVIRONMENT, "target", (3, "broken"), r"'target', row 3: field 'fields'"),
    "no task": (ENVIRONMENT, "prompts", (1, "Q: what is this"), "column 'prompt': field 'prefix': 'Q: what is t'"),
    "a conversation": (
        POLICY, "completions", (0, [{"role": "assistant", "content": P_GOLD}]),
        "column 'completions', row 0: expected text, found list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(case: str) -> None:
    functions, column, change, message = BAD[case]
    for function in functions:
        columns = batch()
        if change is None:
            del columns[column]
        elif isinstance(change, tuple):
            columns[column][change[0]] = change[1]
        else:
            columns[column] = columns[column][change] if isinstance(change, slice) else change
        with pytest.raises(ValueError, match=message):
            function(**columns)


def test_means_reach_the_log() -> None:
    logged: dict[str, float] = {}
    rewards.policy_reward(**batch(), log_metric=logged.__setitem__)
    rewards.environment_reward(**batch(), log_metric=logged.__setitem__)
    assert logged["policy/parsed"] == 0.5
    assert logged["policy/best_value"] == 0.5
    assert logged["policy/skill"] == 1.0  # the one legal answer is the best move
    assert logged["environment/exact"] == logged["environment/fen_exact"] == 0.5
    assert logged["environment/copied_input"] == 0.5
    nowhere_legal: dict[str, float] = {}
    rewards.policy_reward(**batch() | {"completions": ["junk"] * 4}, log_metric=nowhere_legal.__setitem__)
    assert "policy/parsed" in nowhere_legal
    assert "policy/skill" not in nowhere_legal
