"""`--help` of the programs: every key with its type, choices, default and variable, shown without waiting for torch.

Half of what a recipe's keys are is TRL's and transformers' own, whose import takes longer than anybody waits for help.
So the text lies beside the programs (`recipes/help/`, written by `make docs`) with the versions that it was made for;
where others are installed, the program builds it again.
"""

import enum
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENVIRONMENT = "ROOKWORLD_"
WIDTH = 100
_PACKAGES = ("trl", "transformers")
_NAMES = {bool: "true|false", int: "WHOLE", float: "NUMBER", str: "TEXT", dict: "MAPPING", list: "LIST", Any: "ANY"}


def stamp() -> str:
    """What a text of help depends on beside the sources."""
    versions = [f"{name} {_version(name)}" for name in _PACKAGES]
    return ", ".join([*versions, f"python {sys.version_info.major}.{sys.version_info.minor}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def stored(program: str | Path) -> Path:
    """Where the help of a program lies."""
    return Path(program).resolve().parent / "help" / f"{Path(program).stem}.txt"


def show_help(program: str | Path) -> None:
    """Print the program's stored help and exit, if that was asked for and it was made for what is installed here."""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    try:
        head, _, text = stored(program).read_text(encoding="utf-8").partition("\n")
    except OSError:
        return
    if head == stamp():
        print(text, end="")
        raise SystemExit(0)


def usage(classes: Sequence[type], hints: Mapping[type, Mapping[str, Any]]) -> str:
    """The help of a recipe.

    A class may say which values of its fields are valid (`CHOICES`, by name), and which of the fields that it inherits
    change nothing (`INERT`): these are named at the end only.
    """
    head = (
        "Every key below may stand in the recipe (`key: value` in a YAML file, given by --config FILE, which may start "
        "from others: `extends: PATH`), in the environment (as the variable behind the key), or on the command line "
        "(--key value). The command line wins over the environment, and that over the file. Lists and mappings are "
        "written as in YAML."
    )
    lines = [*textwrap.wrap(head, WIDTH)]
    for cls in classes:
        inert = set(getattr(cls, "INERT", ()))
        lines += ["", cls.__name__]
        for field in sorted(fields(cls), key=lambda field: field.name not in cls.__annotations__):  # its own first
            if field.name in hints[cls] and field.name not in inert:
                lines += _entry(field, hints[cls][field.name], getattr(cls, "CHOICES", {}).get(field.name))
        if inert:
            text = f"Keys that change nothing here, or that have only one valid value: {', '.join(sorted(inert))}."
            lines += ["", *textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _entry(field: Field[Any], hint: Any, choices: Sequence[Any] | None) -> list[str]:
    kind = "|".join(str(choice) for choice in choices if not isinstance(choice, bool)) if choices else kind_of(hint)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    value = "required" if default is MISSING else f"default {shown(default)}"
    head = [f"--{field.name} {kind}", f"({value})", f"{ENVIRONMENT}{field.name.upper()}"]
    about = " ".join(field.metadata.get("help", "").split())
    return ["  " + "  ".join(head), *textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def shown(default: Any) -> str:
    """A default as a recipe would write it."""
    if isinstance(default, enum.Enum):
        default = default.value
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"{default:g}" if isinstance(default, float) else str(default)


def kind_of(hint: Any) -> str:
    """A type in one word, or its choices: `NUMBER`, `fast|exact`."""
    words: list[str] = []
    for each in alternatives(hint):
        if isinstance(each, tuple):
            words += map(str, each)
        elif each is not types.NoneType:
            words.append(_NAMES.get(typing.get_origin(each) or each, "TEXT"))
    return "|".join(dict.fromkeys(words))


def alternatives(hint: Any) -> list[Any]:
    """What a field of a type may hold: of a union each member; a tuple of values stands for a choice among them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # `SomeEnum | str` means "one of the enum's values": a misspelt value would pass as text.
        enums = any(map(_is_enum, arguments))
        return [each for member in arguments if not (enums and member is str) for each in alternatives(member)]
    if origin is typing.Literal:
        return [arguments]
    return [tuple(member.value for member in hint)] if _is_enum(hint) else [hint]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
