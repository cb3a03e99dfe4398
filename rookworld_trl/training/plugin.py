"""The seams of a step: what a plug-in is told, and where it may have a say. The core never imports one.

A plug-in is what a run may do besides. It is one dataclass in one file of `rookworld_trl/plugins/`: its fields are its
settings, and the keys of a recipe. It is handed to the trainer (`plugins=[...]`), and is a callback of it as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback

from rookworld_trl.checkpointing.store import Remembers
from rookworld_trl.settings.parser import check_options

Row = dict[str, Any]


class Plugin(Remembers, TrainerCallback):
    """Base of plug-ins. Every method may be left as it is; a step calls them in the order in which they stand here.

    Attributes:
        trainer: the trainer that it was handed to, once that is built; see `attach`.
    """

    NAME: ClassVar[str]  # the key that turns it on, by which messages and the other plug-ins know it
    STATE: ClassVar[str] = ""  # its name in a checkpoint, where that is another
    REMEMBERED: ClassVar[tuple[str, ...]] = ()  # attributes that a checkpoint keeps
    UNDONE: ClassVar[bool] = False  # its state goes back with the weights when a step is undone
    SOURCE: ClassVar[bool] = False  # its `rows` chooses the prompts; a run has one such plug-in
    SAMPLED: ClassVar[bool] = False  # it compares what samples earn, of which an exact objective has no need
    ANY_TRAINER: ClassVar[bool] = False  # it needs no more than callbacks and `told`: supervised training has it too

    trainer: Any

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def on(self) -> bool:
        """Whether its settings ask for it; if not, the trainer leaves it out."""
        return True

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        """What it does not go together with, as lines "field: what is wrong with it. What to do".

        Args:
            args: the trainer's configuration.
            others: names of the other plug-ins that are on.
        """
        return iter(())

    def attach(self, trainer: Any) -> None:
        """The trainer is built, but for what recovers from faults."""
        self.trainer = trainer

    @property
    def keeps_state(self) -> bool:
        """Whether a checkpoint holds something of it."""
        return bool(self.REMEMBERED) or type(self).state_dict is not Plugin.state_dict

    def rows(self, rows: list[Row]) -> Any:
        """A generation batch of training begins: put other rows in place of this process's, in the list itself.

        Returns:
            Their `Samples`, if it has sampled them already; else None.
        """

    def ended(self, phase: str, seconds: float) -> None:
        """A part of a step is over: `sampling` or `rewards`."""

    def rewarded(self, rows: list[Row], rewards: torch.Tensor) -> None:
        """The rewards (N,) of all processes' completions, NaN for none; `rows` are this process's."""

    def sampled(self, rows: list[Row], batch: Row) -> None:
        """The batch of this process as the loss will get it, which may be changed: `advantages` (B,) or (B, C)."""

    def told(self, event: Mapping[str, Any]) -> None:
        """Something has happened to the run, in the main process: `event` is `end`, or what a plug-in tells."""


def check_plugins(args: Any, plugins: Sequence[Plugin]) -> None:
    """Raises:
    ValueError: what a plug-in does not go together with; the message names the field, its value and the remedy.
    """
    on = [plugin for plugin in plugins if plugin.on]
    sources = [plugin.NAME for plugin in on if plugin.SOURCE]
    if len(sources) > 1:
        raise ValueError(f"`{sources[0]}` and `{sources[1]}` both choose the prompts. Leave one of them out")
    if sources and args.use_vllm:
        raise ValueError(
            f"`{sources[0]}` goes not with vLLM, which takes one setting for whole batches. Unset `use_vllm`, or leave "
            "it out"
        )
    for plugin in on:
        lines = list(plugin.refusals(args, [other.NAME for other in on if other is not plugin]))
        if plugin.SAMPLED and args.objective != "sampled":
            known = "the points of a completion say what each alternative earns, so no samples are compared"
            lines.append(f"{plugin.NAME}: `objective` is {args.objective}, and {known}. Leave it out")
        for line in lines:
            name, _, problem = line.partition(": ")
            value = getattr(plugin, name) if hasattr(plugin, name) else getattr(args, name)
            raise ValueError(f"`{name}` is {value!r}: {problem}.")


def settings_of(plugins: Sequence[Plugin]) -> dict[str, Any]:
    """The settings of plug-ins by their keys."""
    own = [plugin for plugin in plugins if is_dataclass(plugin)]
    return {field.name: getattr(plugin, field.name) for plugin in own for field in fields(plugin) if field.init}
