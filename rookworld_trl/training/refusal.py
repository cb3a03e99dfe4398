"""The one shape of errors about bad arguments: field, value, what is wrong with it, what to do."""

from collections.abc import Iterator
from typing import Any


def require(condition: bool, name: str, value: Any, problem: str, remedy: str) -> None:
    """Raises:
    ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"`{name}` is {value!r}: {problem}. {remedy[0].upper()}{remedy[1:]}.")


def refuse(config: Any, clashes: Iterator[str]) -> None:
    """Raises:
    ValueError: with the first of the clashes, "field: what is wrong with it. What to do", and the field's value.
    """
    for clash in clashes:
        name, _, problem = clash.partition(": ")
        raise ValueError(f"`{name}` is {getattr(config, name)!r}: {problem}.")
