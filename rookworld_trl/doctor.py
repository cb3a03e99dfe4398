"""Is my GRPO scoring what it sampled? Runs the first batch of a TRL setup and says what is wrong with it.

In a program of one's own, before the first update:

    trainer.add_callback(GateCallback(trainer))
    trainer.train()  # raises GateError if the loss does not score what was sampled

By itself:

    rookworld-doctor --model MODEL --dataset DATA [any field of GRPOConfig] [--config recipe.yaml]

Takes the setup that `GRPOTrainer` would train with (its fields, from the command line or a YAML file), samples and
scores one batch with TRL's own trainer, and prints a table: what was measured, what is allowed, what to do. Nothing is
trained, nothing is written. The exit code is 0 if every gate holds, 1 if one does not, 2 where the input is at fault.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig

from rookworld_trl.modeling.hooks import Drawn, install_position_hook, record_generate, replaced
from rookworld_trl.settings.parser import bad_input, option, parse
from rookworld_trl.training.gates import GATES, FirstBatch, GateResult, enforce
from rookworld_trl.training.sampler import Samples

logger = logging.get_logger(__name__)

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DoctorArguments:
    """What `GRPOConfig` does not hold."""

    model: str = field(metadata={"help": "A folder, or a name on the Hub."})
    dataset: str = field(metadata={"help": "A .jsonl, .json, .csv or .parquet file, or a name on the Hub."})
    dataset_config: str | None = option(None, "Configuration of a data set on the Hub.")
    dataset_split: str = option("train", "Split of a data set on the Hub.")
    position_hook: bool = option(False, "Install this package's position hook first, to see what it changes.")
    json: str | None = option(None, "Write the measurements to this file too.")


def load_prompts(arguments: DoctorArguments) -> Any:
    """The data set that the arguments name.

    Raises:
        ValueError: a file of another kind, or without a `prompt` column.
        FileNotFoundError: a file that is not there.
    """
    from datasets import load_dataset

    path = Path(arguments.dataset)
    if path.suffix:
        loader = LOADERS.get(path.suffix)
        if loader is None:
            raise ValueError(f"--dataset {path}: a {path.suffix} file is not read here. Give one of {sorted(LOADERS)}")
        if not path.is_file():
            raise FileNotFoundError(f"--dataset {path}: there is no such file")
        dataset = load_dataset(loader, data_files=str(path), split="train")
    else:
        dataset = load_dataset(arguments.dataset, arguments.dataset_config, split=arguments.dataset_split)
    if "prompt" not in dataset.column_names:
        columns = ", ".join(f"`{name}`" for name in dataset.column_names)
        raise ValueError(f"--dataset {arguments.dataset}: GRPO needs a `prompt` column, this has {columns}")
    return dataset


def trainer_of(arguments: DoctorArguments, config: GRPOConfig) -> Any:
    """TRL's trainer as the user would build it, but for the rewards: the gates look at log-probs alone."""
    from trl import GRPOTrainer

    def no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = GRPOTrainer(arguments.model, no_reward, config, load_prompts(arguments))
    for model in (trainer.model, trainer.ref_model) if arguments.position_hook else ():
        if model is not None:
            install_position_hook(model)
    return trainer


class GateCallback(TrainerCallback):
    """The gates for any `GRPOTrainer` of TRL's: `trainer.add_callback(GateCallback(trainer))`.

    TRL has no event between scoring a batch and the loss, so the trainer is handed over; when training begins, its
    `_generate_and_score_completions` is watched for one batch and then left as it was.

    Args:
        trainer: whose first batch is measured.
        strict: raise when a gate fails; otherwise print what was measured and train on.

    Attributes:
        results: what was measured; empty before the first batch.

    Raises:
        GateError: in `train()`, before the first update.
    """

    def __init__(self, trainer: Any, strict: bool = True):
        self.trainer, self.strict = trainer, strict
        self.results: list[GateResult] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        original = trainer._generate_and_score_completions

        def watched(inputs: Any) -> Any:
            if not trainer.model.training:  # an evaluation before the first step
                return original(inputs)
            trainer._generate_and_score_completions = original
            batch, self.results = _measured(trainer, original, inputs)
            for result in self.results:
                trainer._metrics["train"][f"gates/{result.gate}"].append(result.measured)
            if self.strict:
                enforce(self.results)
            elif trainer.accelerator.is_main_process:
                print(*self.results, sep="\n", flush=True)
            return batch

        trainer._generate_and_score_completions = watched


def examine(trainer: Any) -> list[GateResult]:
    """Sample and score a first batch of any `GRPOTrainer`, without training, and measure every gate on it.

    For one process that holds the whole model; where weights are sharded use `GateCallback`.
    """
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    return _measured(trainer, trainer._generate_and_score_completions, rows)[1]


def _measured(trainer: Any, generate_and_score: Any, inputs: Any) -> tuple[Any, list[GateResult]]:
    single_turn, turns = trainer._generate_single_turn, list[Samples]()

    def recorded(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        with record_generate(policy, rows=64) as drawn_of:
            completion_ids, logps = single_turn(prompt_ids, *args, **kwargs)
        drawn: Sequence[Drawn] = drawn_of(completion_ids) if logps is None else [Drawn(row) for row in logps]
        turns.append(Samples(prompt_ids, completion_ids, [*drawn, *[None] * (len(completion_ids) - len(drawn))]))
        return completion_ids, logps

    score = trainer._get_per_token_logps_and_entropies
    first = FirstBatch(trainer.args, trainer.accelerator, trainer.model, score)
    with replaced(trainer, _generate_single_turn=recorded):
        batch = generate_and_score(inputs)
    if "pixel_values" in batch:
        logger.warning("the gates score text alone: a batch with images is not measured")
        return batch, []
    if len(turns) == 1 and any(turns[0].drawn):  # tools and rollout functions put completions together themselves
        first.sampled = turns[0]
    return batch, first.measure(batch, trainer.state.global_step)


# Why a gate may have nothing to measure.
_UNMEASURED = dict.fromkeys(
    ("temperature", "truncation", "sampled_ids", "sampler"), "the batch is sampled out of sight"
)
_UNMEASURED["reference"] = "there is no reference (`beta` is 0), or updates have been made"


def table(results: Sequence[GateResult]) -> str:
    """What was measured, as a table for a terminal; below it what to do about what fails."""
    measured = {result.gate: result for result in results}
    rows = [("gate", "measured", "allowed", "verdict")]
    for gate in GATES:
        if (result := measured.get(gate)) is not None:
            verdict = "holds" if result.passed else "FAILS"
            rows.append((gate, f"{result.measured:.2g} {result.unit}", f"{result.bound:.2g}", verdict))
        else:
            rows.append((gate, "-", "-", f"not measured: {_UNMEASURED.get(gate, 'left out')}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[3]]) for row in rows]
    failed = {result.gate: result.remedy for result in results if not result.passed}
    if failed.keys() & set(GATES[:5]) and "sampler" in failed:
        failed["sampler"] = "Follows from what fails above: put that right first"
    advice = [fill(f"{gate}: {remedy}.", 100, subsequent_indent="  ") for gate, remedy in failed.items()]
    advice = advice or ["Nothing is wrong with what was measured."]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *advice])


# What no gate measures, since it is right and slow. transformers' trainers turn the cache off in what they save.
_WITHOUT_CACHE = """
Sampling is slow: the model's generation config has `use_cache: false`, so every token is computed anew from the first
one on. Set `use_cache` to true in its config.json and generation_config.json."""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `rookworld-doctor`."""
    with tempfile.TemporaryDirectory() as folder, bad_input():
        words = ["--report_to", "none", *(sys.argv[1:] if words is None else words), "--output_dir", folder]
        arguments, config = parse((DoctorArguments, GRPOConfig), words, __doc__)
        results = examine(trainer := trainer_of(arguments, config))
    print(table(results))
    if trainer.model.generation_config.use_cache is False:
        print(_WITHOUT_CACHE)
    if arguments.json:
        rows = [{"gate": each.gate, "measured": each.measured, "bound": each.bound} for each in results]
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
