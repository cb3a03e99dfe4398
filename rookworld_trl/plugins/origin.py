"""A run's settings in one file, and a new run from another one's: `--from RUN` takes its settings and its model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.checkpointing.resume import HOW_STARTED
from rookworld_trl.checkpointing.store import newest_valid
from rookworld_trl.files import needs_disk, write_atomically
from rookworld_trl.settings.parser import RecipeError, option
from rookworld_trl.training.plugin import Plugin

RECIPE_FILE = "recipe.yaml"  # in the output folder: what was set, from files, environment and command line
NOT_KEPT = (*HOW_STARTED, "hub_*", "push_to_hub*", "*token")  # how the run was started, where it goes, secrets
STARTS = ("model", "init_from")


@dataclass
class Origin(Plugin):
    """Writes `recipe.yaml`, and says what is another than in the run that this one comes from.

    Attributes:
        given: every setting that was set; the parser fills it in.
    """

    NAME = "from_run"
    ANY_TRAINER = True

    from_run: str | None = option(None, "Set by `--from RUN`: the run whose settings and model this one takes.")

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = {}

    @property
    def kept(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.given.items()
            if not any(fnmatchcase(name, pattern) for pattern in NOT_KEPT)
        }

    @cached_property  # the other run may be gone when this one ends
    def changed(self) -> dict[str, list[Any]]:
        """Settings that the other run had not, or otherwise, as name: [then, now]; None for not set."""
        if self.from_run is None:
            return {}
        then, now = yaml.safe_load(_recipe_of(Path(self.from_run)).read_text(encoding="utf-8")), self.kept
        names = [name for name in {**then, **now} if name not in STARTS and then.get(name) != now.get(name)]
        return {name: [then.get(name), now.get(name)] for name in names}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or not self.given:
            return
        file = Path(str(args.output_dir), RECIPE_FILE)
        with needs_disk(file):
            write_atomically(file, yaml.safe_dump(self.kept, sort_keys=False))
        if self.from_run is not None:
            changes = [f"`{name}` was {then!r} and is {now!r}" for name, (then, now) in self.changed.items()]
            print(f"from {self.from_run}: {'; '.join(changes) or 'all settings are its own'}")


def _recipe_of(run: Path) -> Path:
    """The file of a run, or of the run that a checkpoint belongs to."""
    return next((file for file in (run / RECIPE_FILE, run.parent / RECIPE_FILE) if file.is_file()), run / RECIPE_FILE)


def forked(argv: Sequence[str] | None, model: str = "model") -> list[str]:
    """The command line with `--from RUN` written out: the run's settings as its recipe, its model as the start.

    Args:
        model: the key of the start.

    Raises:
        RecipeError: the run has no settings or no model, or the new one has no folder of its own.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--from=") else [word])]
    if "--from" not in words:
        return list(argv)
    place = words.index("--from")
    run = Path(words[place + 1] if place + 1 < len(words) else "")
    rest = words[:place] + words[place + 2 :]
    if not _recipe_of(run).is_file():
        raise RecipeError(f"--from {run}: there is no {RECIPE_FILE}; give that run's --config and its --{model}")
    if not any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in rest):
        raise RecipeError(f"--from {run}: the new run needs a folder of its own; give --output_dir")
    start = next((each for each in (run / "checkpoint", run) if (each / "config.json").is_file()), newest_valid(run))
    if start is None:
        raise RecipeError(f"--from {run}: it holds neither a trained model nor a checkpoint that verifies")
    return ["--config", str(_recipe_of(run)), f"--{model}", str(start), "--from_run", str(run), *rest]
