"""JSON schemas of the recipes' YAML, made from the classes that the programs parse.

Editors then complete keys, show what each means, and mark what the parser would refuse. `make docs` writes them.
"""

import enum
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from recipes import grpo, sft
from rookworld_trl.settings.parser import EXTENDS

RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {"grpo": grpo.CLASSES, "sft": sft.CLASSES}
FILES = {RECIPES / f"{name}.schema.json": classes for name, classes in KINDS.items()}
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", dict: "object"}


def modeline(recipe: Path) -> str:
    """The line of a recipe by which editors find its schema; presets are for GRPO."""
    name = next((name for name in KINDS if name in recipe.parts), "grpo")
    return f"# yaml-language-server: $schema={'../' * (len(recipe.relative_to(RECIPES).parts) - 1)}{name}.schema.json"


def schema(classes: Sequence[type]) -> str:
    """The schema of a program's recipes, as text; its keys are the fields, and `extends`."""
    files = {"type": "string", "description": "A file that this one starts from, relative to itself."}
    properties: dict[str, Any] = {EXTENDS: {"anyOf": [files, {"type": "array", "items": files}]}}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for each in (field for field in fields(cls) if field.init):
            properties[each.name] = {**_described(each), **_allowed(hints[each.name])}
    head = '{"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": false,'
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rule)}" for name, rule in properties.items())
    return f'{head}\n"properties": {{\n{lines}\n}}}}\n'


def _described(field: Field[Any]) -> dict[str, Any]:
    about = {"description": " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())}
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return about if default is MISSING else about | {"default": getattr(default, "value", default)}


def _allowed(hint: Any) -> dict[str, Any]:
    """What a key takes. A value whose class is an enumeration is one of its names, whatever else its type allows."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    none = [None] if type(None) in members else []
    named = [each for each in members if isinstance(each, type) and issubclass(each, enum.Enum)]
    if named:
        return {"enum": [*(each.value for each in named[0]), *none]}
    kinds = [_one(each) for each in members]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _one(hint: Any) -> dict[str, Any]:
    origin, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inside)}
    if origin in (list, tuple):
        return {"type": "array", **({"items": _allowed(inside[0])} if inside else {})}
    return {"type": NAMES[origin]} if origin in NAMES else {}
