"""The one shape of errors about bad arguments: field, value, what is wrong with it, what to do."""

from typing import Any

Clash = tuple[str, Any, str]  # a field, whether it clashes with others, and what is wrong and to be done then


def require(condition: bool, name: str, value: Any, problem: str, remedy: str) -> None:
    """Raises:
    ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"`{name}` is {value!r}: {problem}. {remedy[0].upper()}{remedy[1:]}.")


def refuse(config: Any, *clashes: Clash) -> None:
    """Raises:
    ValueError: a field of the configuration clashes with others.
    """
    for name, found, problem in clashes:
        if found:
            raise ValueError(f"`{name}` is {getattr(config, name)!r}: {problem}.")
