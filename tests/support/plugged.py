"""Settings of the trainer and of plug-ins in one mapping, as a recipe has them."""

from dataclasses import fields
from typing import Any

from rookworld_trl.plugins import offered
from rookworld_trl.training.plugin import Plugin


def plugged(settings: dict[str, Any]) -> tuple[dict[str, Any], list[Plugin]]:
    """The settings that are not a plug-in's, and the plug-ins that the others make."""
    left, made = dict(settings), []
    for cls in offered():
        own = {field.name: left.pop(field.name) for field in fields(cls) if field.init and field.name in left}
        made += [cls(**own)] if own else []
    return left, made


def plugin_of(trainer: Any, which: type[Plugin] | str) -> Any:
    """The trainer's plug-in of a class, or by its name."""
    return next(each for each in trainer.plugins if getattr(which, "NAME", which) == each.NAME)
