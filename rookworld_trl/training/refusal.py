"""The one shape of errors about bad arguments."""

from typing import Any


def require(condition: bool, name: str, value: Any, problem: str, remedy: str) -> None:
    """Raise the one error shape of bad arguments: field, value, what is wrong with it, what to do."""
    if not condition:
        raise ValueError(f"`{name}` is {value!r}: {problem}. {remedy[0].upper()}{remedy[1:]}.")
