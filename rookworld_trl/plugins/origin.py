"""A run's settings in one file: what was set for it, from files, the environment and the command line."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.checkpointing.resume import HOW_STARTED
from rookworld_trl.checkpointing.stopping import needs_disk
from rookworld_trl.files import write_atomically
from rookworld_trl.training.plugin import Plugin

RECIPE_FILE = "recipe.yaml"  # in the output folder
NOT_KEPT = (*HOW_STARTED, "hub_*", "push_to_hub*", "*token")  # how the run was started, where it goes, secrets


@dataclass
class Origin(Plugin):
    """Writes `recipe.yaml`, from which the same run, or another one like it, can be started.

    Attributes:
        given: every setting that was set; the parser fills it in.
    """

    NAME = "origin"
    ANY_TRAINER = True

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or not self.given:
            return
        kept = {
            name: value
            for name, value in self.given.items()
            if not any(fnmatchcase(name, pattern) for pattern in NOT_KEPT)
        }
        file = Path(str(args.output_dir), RECIPE_FILE)
        with needs_disk(file):
            write_atomically(file, yaml.safe_dump(kept, sort_keys=False))
