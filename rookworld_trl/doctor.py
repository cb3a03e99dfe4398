"""Is my GRPO scoring what it sampled? Runs the first batch of a TRL setup and says what is wrong with it.

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

from trl import GRPOConfig

from rookworld_trl.settings.parser import bad_input, option, parse
from rookworld_trl.training import gates
from rookworld_trl.training.gates import GATES, GateResult

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


def no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """The gates look at log-probs alone."""
    return [0.0] * len(completions)


def examine(arguments: DoctorArguments, config: GRPOConfig) -> list[Any]:
    """Build TRL's trainer as the user would, and measure every gate on its first batch."""
    from trl import GRPOTrainer

    from rookworld_trl.modeling.hooks import install_position_hook

    trainer = GRPOTrainer(arguments.model, no_reward, config, load_prompts(arguments))
    for model in (trainer.model, trainer.ref_model) if arguments.position_hook else ():
        if model is not None:
            install_position_hook(model)
    return gates.examine(trainer)


# Why a gate may have nothing to measure.
_UNMEASURED = {
    "temperature": "the batch is sampled out of sight",
    "truncation": "the batch is sampled out of sight",
    "sampled_ids": "the batch is sampled out of sight",
    "reference": "there is no reference (`beta` is 0), or updates have been made",
    "sampler": "the batch is sampled out of sight",
}


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


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `rookworld-doctor`."""
    with tempfile.TemporaryDirectory() as folder, bad_input():
        words = ["--report_to", "none", *(sys.argv[1:] if words is None else words), "--output_dir", folder]
        arguments, config = parse((DoctorArguments, GRPOConfig), words, __doc__)
        results = examine(arguments, config)
    print(table(results))
    if arguments.json:
        rows = [{"gate": each.gate, "measured": each.measured, "bound": each.bound} for each in results]
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
