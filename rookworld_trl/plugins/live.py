"""While a run goes on: a progress bar, one readable line per logged step, and every number in `metrics.jsonl`."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from rookworld_trl.files import append_line, read_rows, write_atomically
from rookworld_trl.settings.terminal import progress_bar

logger = logging.get_logger(__name__)

METRICS_FILE = "metrics.jsonl"

# Label, key in TRL's log, format. A key that a run does not log is left out of the line.
Columns = Sequence[tuple[str, str, str]]
COLUMNS: Columns = (
    ("KL", "kl", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("informative groups", "groups/informative", ".0%"),
    ("best", "eval_best", ".4g"),  # of `metric_for_best_model`
    ("at step", "eval_best_step", ".0f"),
)


def report_live(trainer: Trainer, folder: Path, columns: Columns = ()) -> None:
    """Have a trainer show a bar and one readable line a step in place of its own bar and printed dictionaries.

    Args:
        trainer: any Trainer of transformers.
        folder: where `metrics.jsonl` goes, one JSON object a logged step.
        columns: label, key in the log, and format of what a line shows before KL, entropy and informative groups.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LiveReport(folder, columns))


def live_line(step: int, steps: int, logs: Mapping[str, Any], columns: Columns = COLUMNS) -> str:
    """One step for a person: `step  12/110  reward P +0.312  A +0.655  KL 0.0021 ...`."""
    # TRL logs None where a step measured nothing but NaN.
    cells = [f"{label} {logs[key]:{spec}}" for label, key, spec in columns if isinstance(logs.get(key), int | float)]
    return "  ".join([f"step {step:>{len(str(steps))}}/{steps}", *cells])


class LiveReport(TrainerCallback):
    """Bar, lines and `metrics.jsonl` (one JSON object per logged step, with `step` and `seconds` since the start).

    Args:
        folder: where `metrics.jsonl` goes; a run that resumes adds to it, from the checkpoint's step on.
        columns: what a line shows before `COLUMNS`.
    """

    def __init__(self, folder: Path, columns: Columns = ()):
        self.columns = (*columns, *COLUMNS)
        self.file = folder / METRICS_FILE
        self.started = 0.0
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if state.is_world_process_zero:  # whose clock decides
            known, damaged = read_rows(self.file)  # no line of a log decides whether a run can go on
            if damaged:
                logger.warning(f"{self.file}: lines {damaged} are damaged and left out")
            rows = [row for row in known if row["step"] <= state.global_step]  # a run killed later has written more
            self.started -= max(
                (row["seconds"] for row in rows if type(row.get("seconds")) in (int, float)), default=0.0
            )
            write_atomically(self.file, "".join(json.dumps(row) + "\n" for row in rows))
            self.bar = progress_bar("train", state.max_steps, "step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        row = {"step": state.global_step, "seconds": round(time.perf_counter() - self.started, 3), **logs}
        try:
            append_line(self.file, json.dumps(row))
        except OSError as error:  # a full disk must not cost the run
            self.bar.write(f"{self.file}: step {state.global_step} is not in it ({error}); make room")
        self.bar.write(live_line(state.global_step, state.max_steps, logs, self.columns))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
