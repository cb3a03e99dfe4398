"""TRL reward functions: one per task and form, None for the other task's rows.

TRL calls a reward function with `prompts`, `completions` and every column of the data set as keyword arguments, each
a list with one entry per completion. A row answered with None takes no part in that function's statistics.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rookworld_trl.chess import ParseError, TaskName, task_of
from rookworld_trl.chess.rewards.environment_score import EnvironmentScore, score_environment
from rookworld_trl.chess.rewards.policy_score import PolicyScore, score_policy, skill

Score = TypeVar("Score", PolicyScore, EnvironmentScore)

# Fields of the scores whose means say something; logged as `policy/parsed`, `environment/fen_exact` and so on.
_LOGGED: dict[TaskName, tuple[str, ...]] = {
    "policy": (
        *("parsed", "best_legal", "best_value", "candidates_legal_distinct", "best_in_moves", "best_in_top5", "top1"),
        "evals_score",
    ),
    "environment": (
        *("parsed", "exact", "fen_exact", "placement_exact", "turn_exact", "castling_exact", "en_passant_exact"),
        *("halfmove_exact", "fullmove_exact", "similarity", "reward_exact", "copied_input"),
    ),
}


def policy_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Graduated reward of the `P:` rows: one of `LEVELS`, -0.3 to 1, or 0 to 0.2 for an answer that only parses.

    Args:
        prompts: texts, `P: ` and a FEN; rows of the other task are left out.
        completions: texts as sampled, without the end token.
        columns: further columns of the data set, of which `legal_moves` (every legal move, UCI) and `legal_cp` (the
            value of each in centipawns from the mover's side; mates are +-(10000 - plies)) are needed.

    Returns:
        One reward a row, None for rows of the other task.

    Raises:
        ValueError: a column is missing or too short, or a row's data is malformed.
    """
    return _logged("policy", "reward", score_policy_rows(prompts, completions, **columns), columns)


def policy_reward_continuous(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Continuous reward of the `P:` rows, -0.3 to 1, None for the others; otherwise as `policy_reward`."""
    return _logged("policy", "continuous", score_policy_rows(prompts, completions, **columns), columns)


def environment_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Graduated reward of the `A:` rows: one of `LEVELS`, -0.3 to 1.

    Args:
        prompts: texts, `A: <FEN>+<move>+<last moves>+`; rows of the other task are left out.
        completions: texts as sampled, without the end token.
        columns: further columns of the data set, of which `target`, the right completion, is needed; where it is None,
            python-chess computes it.

    Returns:
        One reward a row, None for rows of the other task.

    Raises:
        ValueError: a column is missing or too short, or a row's data is malformed.
    """
    return _logged("environment", "reward", score_environment_rows(prompts, completions, **columns), columns)


def environment_reward_continuous(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Continuous reward of the `A:` rows, -0.3 to 1, None for the others; otherwise as `environment_reward`."""
    return _logged("environment", "continuous", score_environment_rows(prompts, completions, **columns), columns)


def score_policy_rows(prompts: list[str], completions: list[str], **columns: Any) -> list[PolicyScore | None]:
    """Score the `P:` rows of a batch, None for the others. Arguments and errors as in `policy_reward`."""
    return _score_rows(
        "policy",
        prompts,
        completions,
        columns,
        ("legal_moves", "legal_cp"),
        lambda _, completion, moves, cp: score_policy(completion, moves, cp),
    )


def score_environment_rows(prompts: list[str], completions: list[str], **columns: Any) -> list[EnvironmentScore | None]:
    """Score the `A:` rows of a batch, None for the others. Arguments and errors as in `environment_reward`."""
    return _score_rows("environment", prompts, completions, columns, ("target",), score_environment)


def _score_rows(
    task: TaskName,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    needed: tuple[str, ...],
    score: Callable[..., Score],
) -> list[Score | None]:
    """Route by prefix, check the columns the task's rows need, score row by row."""
    try:
        rows = [i for i, prompt in enumerate(prompts) if task_of(prompt) == task]
    except (ParseError, AttributeError) as error:
        raise ValueError(f"column 'prompt': {error}") from error
    for name in needed if rows else ():
        if name not in columns:
            raise ValueError(
                f"column '{name}' is missing, which the {task} reward needs; "
                f"add it to the data set (found: {', '.join(sorted(columns)) or 'none'})"
            )
    scores: list[Score | None] = [None] * len(prompts)
    for i in rows:
        if not isinstance(completions[i], str):
            raise ValueError(
                f"column 'completions', row {i}: expected text, found {type(completions[i]).__name__}; "
                "use plain prompts, not conversations"
            )
        try:
            scores[i] = score(prompts[i], completions[i], *(columns[name][i] for name in needed))
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"columns 'prompt', {', '.join(map(repr, needed))}, row {i}: {error}") from error
    return scores


def _logged(task: TaskName, form: str, scores: Sequence[Any], columns: dict[str, Any]) -> list[float | None]:
    """The scores' rewards; the batch's means go to TRL's `log_metric`: what evaluation counts shows in training."""
    log_metric = columns.get("log_metric")
    scored = [score for score in scores if score is not None]
    if log_metric is not None and scored:
        for name in _LOGGED[task]:
            log_metric(f"{task}/{name}", sum(float(getattr(score, name)) for score in scored) / len(scored))
        if task == "policy" and (shown := skill(scores, columns["legal_cp"])) is not None:
            log_metric("policy/skill", shown)
    return [None if score is None else getattr(score, form) for score in scores]
