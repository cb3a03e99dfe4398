"""Verifiable rewards of both tasks. Training rewards and evaluation metrics come from the same scorers."""

from rookworld_trl.chess.rewards.decisions import ChessPoints
from rookworld_trl.chess.rewards.environment_score import EnvironmentScore, score_environment
from rookworld_trl.chess.rewards.functions import (
    environment_reward,
    environment_reward_continuous,
    policy_reward,
    policy_reward_continuous,
    score_environment_rows,
    score_policy_rows,
)
from rookworld_trl.chess.rewards.policy_score import PolicyScore, score_policy

__all__ = [
    "COLUMNS",
    "REWARDS",
    "ChessPoints",
    "EnvironmentScore",
    "PolicyScore",
    "environment_reward",
    "environment_reward_continuous",
    "policy_reward",
    "policy_reward_continuous",
    "score_environment",
    "score_environment_rows",
    "score_policy",
    "score_policy_rows",
]

# The rewards that a run chooses from by name.
REWARDS = {
    "graduated": [policy_reward, environment_reward],
    "continuous": [policy_reward_continuous, environment_reward_continuous],
}

# What its line of each step shows: label, key in TRL's log, format. A run logs one of a reward's two forms, by name.
COLUMNS = [
    ("graduated P", "rewards/policy_reward/mean", "+.3f"),
    ("A", "rewards/environment_reward/mean", "+.3f"),
    ("continuous P", "rewards/policy_reward_continuous/mean", "+.3f"),
    ("A", "rewards/environment_reward_continuous/mean", "+.3f"),
    ("B legal", "policy/best_legal", ".0%"),
    ("skill", "policy/skill", "+.3f"),
    ("A exact", "environment/exact", ".0%"),
    ("held out: reward", "eval_reward", "+.3f"),
    ("B legal", "eval_policy/best_legal", ".1%"),
    ("skill", "eval_policy/skill", "+.3f"),
    ("A exact", "eval_environment/exact", ".1%"),
]
