"""The two tasks of a RookWorld model, chosen by the prompt's prefix (`P: ` or `A: `)."""

from typing import Literal

from rookworld_trl.chess import environment, policy
from rookworld_trl.chess.format import ParseError, position_key

TaskName = Literal["policy", "environment"]

PREFIXES: dict[TaskName, str] = {"policy": policy.PREFIX, "environment": environment.PREFIX}


def task_of(prompt: str) -> TaskName:
    """Name the task of a prompt or of a whole row.

    Raises:
        ParseError: the text starts with neither prefix.
    """
    for name, prefix in PREFIXES.items():
        if prompt.startswith(prefix):
            return name
    raise ParseError("prefix", prompt[:12], "start the text with 'P: ' or 'A: '")


def split_row(text: str) -> tuple[str, str]:
    """Split a whole row into prompt and completion at the exact character where the completion starts.

    `prompt + completion == text` always holds. For `P:` the prompt ends with the FEN's last digit, so padding
    belongs to the completion (the model emits it); for `A:` it ends with the third `+`.

    Raises:
        ParseError: the row has no well-formed prompt.
    """
    start = policy.completion_start(text) if task_of(text) == "policy" else environment.completion_start(text)
    return text[:start], text[start:]


__all__ = [
    "PREFIXES",
    "ParseError",
    "TaskName",
    "environment",
    "policy",
    "position_key",
    "split_row",
    "task_of",
]
