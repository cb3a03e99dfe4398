"""A run that is tried and not done: every check, its first steps, and what the whole of it would take.

Everything is written to a folder that is deleted again, so that a wrong setting is found in a minute, not in an hour.
"""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.checkpointing import stopping
from rookworld_trl.checkpointing.resume import choose_start
from rookworld_trl.memory import memory_gb, on_cuda
from rookworld_trl.settings.parser import blame, option
from rookworld_trl.training.plugin import Plugin, settings_of

STEPS, SECONDS = 12, 15.0  # enough for a mean; the first step, which checks and warms up, is not in it
ITEMS = 256  # held-out ones that are measured
NEVER = 10**9
# GB of a card, and one that has them.
CARDS = {8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4060 Ti", 24: "RTX 4090", 40: "A100", 80: "H100"}
SHARE = 0.85  # of a card that may be filled
HEAD_ROWS = 4096  # tokens whose logits are there at once, about what TRL's head and the shared passes take
CONTEXT = 1.0e9  # bytes that CUDA and its libraries take by themselves, about


@dataclass
class DryRun(Plugin):
    """Times steps, ends training after enough of them, and prints what the whole run would take.

    Attributes:
        asked: the arguments of the run as they were given.
        minutes: the limit of its training's time.
        ends: when training began, and when each step was over.
    """

    NAME = "dry_run"
    ANY_TRAINER = True

    dry_run: bool = option(False, "Check everything, make some steps, say what the run would take; write nothing.")

    def __post_init__(self) -> None:
        self.asked: Any = None
        self.minutes: float | None = None
        self.ends: list[float] = []

    @property
    def on(self) -> bool:
        return self.dry_run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ends.append(time.perf_counter())
        enough = [len(self.ends) > STEPS or self.ends[-1] - self.ends[0] > SECONDS]
        broadcast_object_list(enough)  # clocks differ between processes, the decision must not
        control.should_training_stop |= enough[0]

    def rehearse(
        self,
        trainer: Any,
        start: Path | None,
        result: dict[str, Any],
        held_out: Any = None,
        measure: Callable[[Any], object] = lambda rows: None,
    ) -> int:
        """Train some steps, measure some held-out items, and print what the whole run would take.

        Args:
            trainer: built inside of `rehearsed`.
            start: the checkpoint to go on from.
            result: the program's, which gets the figures.
            held_out: a data set that would be measured before and after, by `measure`; None: nothing is measured.

        Returns:
            The exit code.
        """
        self.trainer, scratch = trainer, Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=start)
        state, tried, first = trainer.state, len(self.ends) - 1, min(1, len(self.ends) - 2)
        a_step = (self.ends[-1] - self.ends[first]) / (tried - first)
        left = state.max_steps - state.global_step + tried
        steps = left if self.minutes is None else min(left, int(60 * self.minutes / a_step) + 1)
        figures = {"seconds_a_step": a_step, "steps": steps, "of": left, "train_minutes": steps * a_step / 60}
        figures |= {"evaluation_minutes": 0.0, "disk_gb": self._models(steps) / 1e9}
        if held_out is not None:
            part, begun = held_out.shuffle(seed=1).select(range(min(ITEMS, len(held_out)))), time.perf_counter()
            measure(part)
            an_item, asked = (time.perf_counter() - begun) / len(part), self.asked
            watched = (
                len(trainer.eval_dataset) * (steps // int(asked.eval_steps)) if asked.eval_strategy == "steps" else 0
            )
            figures["evaluation_minutes"] = an_item * (2 * len(held_out) + watched) / 60
            written = sum(file.stat().st_size for file in scratch.glob("evaluation_*"))
            figures["disk_gb"] += 2 * written * len(held_out) / len(part) / 1e9
        logs = sum(file.stat().st_size for file in scratch.glob("*.jsonl"))
        figures |= {"memory_gb": memory_gb(), "disk_gb": figures["disk_gb"] + logs * steps / tried / 1e9}
        figures["files"] = self._files(steps)
        if trainer.accelerator.is_main_process:
            said = f"\ndry run: {tried} steps were made, nothing was written to {self.asked.output_dir}"
            print(said, *self._lines(figures, free=shutil.disk_usage(scratch).free / 1e9), sep="\n  ")
        result |= figures | {"output_dir": self.asked.output_dir}
        return stopping.DIVERGED if trainer.stop_reason else stopping.DONE

    def _models(self, steps: int) -> float:
        """Bytes of the trained model and of the checkpoints that stay."""
        weights = sum(each.nbytes for each in self.trainer.model.parameters())
        states = self.trainer.optimizer.state.values()
        moments = sum(each.nbytes for state in states for each in state.values() if isinstance(each, torch.Tensor))
        return weights + self._kept(steps) * (weights + moments)

    def _kept(self, steps: int) -> int:
        """Checkpoints that are there at most, the one being written among them."""
        asked = self.asked
        if asked.save_strategy != "steps":
            return 0
        made = -(-steps // max(1, int(asked.save_steps if asked.save_steps >= 1 else asked.save_steps * steps)))
        return min(made, asked.save_total_limit or made) + 1

    def _files(self, steps: int) -> list[str]:
        """What the run leaves in its folder."""
        names = ["metrics.jsonl", "recipe.yaml", "finished.json"]
        if hasattr(self.asked, "num_generations"):
            names += ["checkpoint/", "evaluation_before.parquet", "evaluation_after.parquet", "summary.json"]
            names += ["report.html", "health.jsonl"]
        else:
            names += ["model.safetensors", "config.json", "generation_config.json", "training.json"]
            names += ["tokenizer.json", "tokenizer_config.json"]
        return names + ["checkpoint-<step>/"] * (self._kept(steps) > 0)

    def _lines(self, figures: dict[str, Any], free: float) -> Iterator[str]:
        """What is printed, as `name  figures`."""
        trainer, asked, steps, of = self.trainer, self.asked, figures["steps"], figures["of"]
        rows = [{key[6:]: row[key] for key in row if key.startswith("gates/")} for row in trainer.state.log_history]
        if gates := ", ".join(f"{gate} {value:.2g}" for row in rows for gate, value in row.items()):
            yield f"gates    all hold: {gates}"
        yield f"a step   {figures['seconds_a_step']:.3g} s"
        training, measuring = figures["train_minutes"], figures["evaluation_minutes"]
        limit = "" if steps == of else f", where `max_train_minutes` ends it; {of} are planned"
        evaluation = f", {measuring:.3g} to measure" if measuring else ""
        yield f"time     {training + measuring:.3g} minutes: {training:.3g} for {steps} steps{limit}{evaluation}"
        most = torch.cuda.mem_get_info()[1] if on_cuda() else psutil.virtual_memory().total
        where = "GPU" if on_cuda() else "machine"
        yield f"memory   {figures['memory_gb']:.3g} GB of the {where}'s {most / 1e9:.3g}"
        kept = self._kept(steps)
        yield f"disk     {figures['disk_gb']:.3g} GB at most, with {kept} checkpoints; {free:.3g} are free"
        yield f"files    {asked.output_dir}/: {', '.join(figures['files'])}"
        if asked.push_to_hub:
            yield f"Hub      {asked.hub_model_id} gets the model; a dry run does not try it"
        config = trainer.model.config
        if config.model_type == "gpt2" and hasattr(asked, "num_generations"):
            texts = trainer.train_dataset[: min(1000, len(trainer.train_dataset))]["prompt"]
            length = max(map(len, trainer.processing_class(list(texts))["input_ids"])) + asked.max_completion_length
            yield "cards    by arithmetic, not measured, without shared prefixes:"
            yield from (f"         {line}" for line in cards(config, asked, trainer.model.num_parameters(), length))


@contextmanager
def rehearsed(args: Any, plugins: Sequence[Plugin]) -> Iterator[DryRun | None]:
    """For a dry run: have it write to a folder beside its own that is gone after the block, and save, tell and publish
    nothing. A run that would go on from a checkpoint of its folder does so.

    Args:
        args: of the trainer that is going to be built; changed.
        plugins: of the run, a `DryRun` among them; changed.

    Yields:
        The `DryRun`; None where none is asked for.

    Raises:
        RecipeError: nothing can be written there.
    """
    own = next(each for each in plugins if isinstance(each, DryRun))
    if not own.on:
        yield None
        return
    own.asked, own.minutes = copy.copy(args), settings_of(plugins).get("max_train_minutes")
    folder = Path(args.output_dir).absolute()
    place = next(each for each in (folder, *folder.parents) if each.exists())
    with blame("output_dir", args.output_dir):
        scratch = tempfile.TemporaryDirectory(prefix=".dry-run-", dir=place)
    args.resume_from_checkpoint = choose_start(args).checkpoint
    args.output_dir, args.report_to, args.push_to_hub = scratch.name, [], False
    args.save_steps, args.eval_steps, args.load_best_model_at_end = NEVER, NEVER, False
    for each in (each for each in plugins if hasattr(each, "alert")):
        each.alert = None
    with scratch:
        yield own


def cards(config: Any, args: Any, parameters: int, length: int) -> Iterator[str]:
    """For each size of card, the largest micro-batch of a GPT-2 that fits `SHARE` of it, by arithmetic.

    Held all the time, in float32: weights, gradients, AdamW's two moments, the reference. While sampling: keys
    and values of the rows sampled together. While learning, a token and layer of width d keeps 38 d bytes with bf16 and
    68 d in float32 (residuals in float32; inputs of the four products, queries, keys, values and GELU's input as
    computed), and logits, their softmax and gradient are there for `HEAD_ROWS` tokens.

    Args:
        length: tokens of the longest row, completion included.
    """
    size, wide = (2, 38) if args.bf16 or args.fp16 else (4, 68)
    held = CONTEXT + 4 * parameters * (4 + bool(args.beta))
    rows = args.per_device_train_batch_size * args.steps_per_generation
    sampling = held + rows * length * 2 * config.n_layer * config.n_embd * size
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    sizes = [each for each in range(1, update + 1) if update % each == 0 and rows % each == 0]
    a_row = length * config.n_layer * config.n_embd * wide
    learning = held + 3 * 4 * config.vocab_size * HEAD_ROWS
    said = ""
    for gigabytes, name in CARDS.items():
        budget = gigabytes * 1e9 * SHARE
        fitting = [each for each in sizes if learning + each * a_row <= budget]
        what = f"micro-batches of {fitting[-1]} rows" if fitting else f"not a row: {(learning + a_row) / 1e9:.1f} GB"
        if fitting and sampling > budget:
            what = f"not: sampling {rows} rows together takes {sampling / 1e9:.1f} GB"
        if what != said:
            yield f"from {gigabytes:>2} GB ({name}): {what}"
        said = what
