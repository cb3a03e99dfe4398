"""What a run may do besides: one file each, with its settings, its object, its refusals and its state."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from rookworld_trl.training.plugin import Plugin, check_plugins, settings_of

__all__ = ["check", "facts_of", "of_any_trainer", "offered", "settings_of", "split"]


def offered() -> list[type[Plugin]]:
    """Every plug-in of this folder that has settings, by the name of its file: a new file is found by itself."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    members = [(module, each) for module in modules for each in vars(module).values() if isinstance(each, type)]
    own = [each for module, each in members if each.__module__ == module.__name__ and issubclass(each, Plugin)]
    return [each for each in own if is_dataclass(each)]


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Plugin]]:
    """The settings that are no plug-in's, and all plug-ins with the others: what a recipe makes of its keys."""
    left = dict(settings)
    made = [
        each(**{field.name: left.pop(field.name) for field in fields(each) if field.init and field.name in left})
        for each in offered()
    ]
    return left, made


def of_any_trainer() -> list[type[Plugin]]:
    """Those that supervised training may have, too."""
    return [each for each in offered() if each.ANY_TRAINER]


def facts_of(plugins: Sequence[Plugin]) -> dict[str, Any]:
    """What a summary says of them: settings, without `alert`, which may hold a secret, and what `--from` changed."""
    found = {name: value for name, value in settings_of(plugins).items() if name != "alert"}
    return found | {"changed": next((each.changed for each in plugins if hasattr(each, "changed")), {})}


def check(_: Any, args: Any, *plugins: Plugin) -> None:
    """What `parse` asks of a recipe's settings: see `check_plugins`."""
    check_plugins(args, plugins)
