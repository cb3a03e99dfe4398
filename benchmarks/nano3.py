"""The long training of rookworld-nano, in parts: what it has reached is one small file, from which any machine goes on.

    python -m benchmarks.nano3 train --positions data/positions
    python -m benchmarks.nano3 export
    python -m benchmarks.nano3 unpack --output runs/nano3

`train` goes on from `benchmarks/results/nano3.safetensors` where that is, else it begins from scratch; the same command
resumes it. `export` writes that file anew from the newest checkpoint, at any time: the weights in half precision, and
the steps so far, the rates to go on at and the tokenizer's name in its metadata. `unpack` makes a checkpoint of it, for
`--model` and `--init_from`. The optimizer's state is left out: its momentum is there again within the steps in which
the rate rises.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import RESULTS, ROOT, write_report
from recipes.sft import CLASSES
from rookworld_trl.checkpointing.store import newest_valid, step_of
from rookworld_trl.modeling.loading import load
from rookworld_trl.modeling.tokenizer import SIDES, build_nano_tokenizer
from rookworld_trl.settings.parser import parse

FILE = RESULTS / "nano3.safetensors"
RECIPE = ROOT / "recipes" / "nano" / "sft" / "config_cpu_long.yaml"
KEPT = torch.float16  # eleven bits of each weight; bfloat16 has eight
START = "start"  # in a part's folder, what it began with


def plan(steps: int, total: int) -> dict[str, Any]:
    """Keys of the recipe for what is left to do: where the fall of the rates has begun, it goes on from there.

    Raises:
        SystemExit: nothing is left.
    """
    recipe, args, *_ = parse(CLASSES, ["--config", str(RECIPE)])
    left, fall = total - steps, args.lr_scheduler_kwargs["num_decay_steps"]
    if left <= args.warmup_steps:
        raise SystemExit(f"{steps:,} of {total:,} steps are done: nothing is left. Give --total a larger number")
    share = min(1.0, left / fall)
    return {
        "max_steps": left,
        "seed": args.seed + steps,  # other trees in another order than in the parts before
        "muon_lr": recipe.muon_lr * share,
        "learning_rate": args.learning_rate * share,
        "lr_scheduler_kwargs": {"num_decay_steps": min(fall, left - int(args.warmup_steps))},
    }


def export(checkpoint: Path, steps: int, total: int, file: Path) -> dict[str, Any]:
    """Write a checkpoint's weights and what a next part needs to know, whole or not at all, and the facts as JSON."""
    model, tokenizer = load(checkpoint)
    going_on = plan(steps, total) if steps < total else {"muon_lr": 0.0, "learning_rate": 0.0}
    facts = {"steps": steps, "total": total, "parameters": model.num_parameters()}
    facts |= {"tokenizer": "nano_side_first" if SIDES["w"] in tokenizer.get_vocab() else "nano"}
    facts |= {name: going_on[name] for name in ("muon_lr", "learning_rate")}
    weights = {name: weight.to(KEPT).contiguous() for name, weight in model.named_parameters()}
    metadata = {name: str(value) for name, value in facts.items()} | {"config": model.config.to_json_string()}
    partial = file.with_name(file.name + ".partial")
    save_file(weights, partial, metadata)
    os.replace(partial, file)
    facts["bytes"] = file.stat().st_size
    write_report(file.with_suffix(".json"), facts)
    return facts


def unpack(file: Path, folder: Path) -> int:
    """Make a checkpoint of an exported file: weights in float32, tokenizer, `training.json`. Returns the steps so far.

    Raises:
        SystemExit: the file is none that `export` wrote.
    """
    with safe_open(str(file), framework="pt") as content:
        facts = content.metadata() or {}
        if missing := {"steps", "tokenizer", "config"} - set(facts):
            raise SystemExit(f"{file}: its metadata lack {', '.join(sorted(missing))}; `export` writes such a file")
        weights = {name: content.get_tensor(name).float() for name in content.keys()}  # noqa: SIM118, no mapping
    model = GPT2LMHeadModel(GPT2Config.from_dict(json.loads(facts["config"])))
    tied = {"lm_head.weight": weights["transformer.wte.weight"]}
    model.load_state_dict(weights | tied)
    model.save_pretrained(folder)
    build_nano_tokenizer(side_first=facts["tokenizer"] == "nano_side_first").save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"steps": int(facts["steps"])}) + "\n", encoding="utf-8")
    return int(facts["steps"])


def begun_at(output: Path) -> int:
    """Steps of the parts before."""
    training = output / START / "training.json"
    return int(json.loads(training.read_text(encoding="utf-8"))["steps"]) if training.exists() else 0


def words_of(positions: Path, output: Path, total: int) -> list[str]:
    """The recipe's command line for the part in this folder, which begins with the exported file where there is one."""
    begun = (output / "run").exists() or (output / START).exists()
    if not begun and FILE.exists():
        unpack(FILE, output / START)
    words = ["recipes/sft.py", "--config", str(RECIPE), "--positions", str(positions.resolve())]
    words += ["--output_dir", str((output / "run").resolve())]
    if (output / START).exists():
        words += ["--init_from", str((output / START).resolve())]
    for key, value in plan(begun_at(output), total).items():
        words += [f"--{key}", json.dumps(value)]
    return words


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "export", "unpack"))
    parser.add_argument("--positions", type=Path, default=ROOT / "data" / "positions")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "nano3", help="folder of this part")
    parser.add_argument("--total", type=int, default=25_000, help="steps of all parts")
    parser.add_argument("--checkpoint", type=Path, help="of `export`; default: the part's newest")
    arguments, more = parser.parse_known_args(argv)
    output = arguments.output
    if arguments.command == "unpack":
        print(f"{output}: {unpack(FILE, output):,} steps")
    elif arguments.command == "train":
        words = words_of(arguments.positions, output, arguments.total)
        raise SystemExit(subprocess.run([sys.executable, *words, *more], cwd=ROOT).returncode)
    else:
        checkpoint = arguments.checkpoint or newest_valid(output / "run")
        if checkpoint is None:
            raise SystemExit(f"{output / 'run'} holds no checkpoint that is whole; `train` writes one every 60 steps")
        steps = begun_at(output) + step_of(checkpoint)
        print(json.dumps(export(checkpoint, steps, arguments.total, FILE)))


if __name__ == "__main__":
    main()
