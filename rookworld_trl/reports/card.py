"""The model card of a trained checkpoint, written from the run's summary: what it is, what it reached, how to use."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rookworld_trl.measuring.comparison import losses
from rookworld_trl.measuring.tables import as_text, changed, players_of
from rookworld_trl.reports.run import GROUPED, read_summary

USAGE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the Hub
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def ask(prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=144, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


start = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
print(ask(f"P: {start}"))  # M: up to five moves  E: an eval each, in pawns for the side to move  B: the best move
print(ask(f"A: {start}+e2e4+e2e4+"))  # <next FEN>+<reward>+<terminated>+<truncated>
```"""

LIMITS = """## Limits

It knows nothing but these two text formats. It plays far below any engine, proposes illegal moves, and its evals are
guesses. Answers to `A:` prompts are predictions, not a rules engine: check them where it matters. Prompts of another
spelling (moves in SAN, FENs without clocks) give arbitrary text."""

REWARDS = {
    "graduated": "six levels from -0.3 (unparsable) to 1.0 (the best answer, or nearly; the exact one)",
    "continuous": (
        "from -0.3 (unparsable) to 1.0, by what move, candidates and evals gain over chance, or by the FEN's similarity"
    ),
}
DECISIONS = "what every legal move adds to `continuous`, and 1 for the right answer, summed exactly"


def write_card(run: Path, checkpoint: Path) -> Path:
    """Write the checkpoint's README.md from the run's `summary.json`, and return its path."""
    summary = read_summary(run)
    path = checkpoint / "README.md"
    path.write_text(_card(summary), encoding="utf-8")
    return path


def trained_on(summary: Mapping[str, Any]) -> str:
    """The reward whose expectation a run raised, by its `objective`; another `reward` was only measured."""
    name, objective = summary["reward"], summary.get("objective", "sampled")
    names = (summary.get("identity") or {}).get("rewards", [])
    own = "own functions" + (f" (`{'`, `'.join(names)}`)" if names else "")
    sampled = f"`{name}`, {REWARDS[name]}" if name in REWARDS else own
    if objective == "exact":
        measured = "" if name == "continuous" else f"; {f'`{name}`' if name in REWARDS else own} was only measured"
        return DECISIONS + measured
    if objective == "mixed":
        return f"{DECISIONS}; and {sampled}, of sampled completions that they leave out"
    return f"{sampled}, of sampled completions"


def _engine(summary: Mapping[str, Any]) -> str:
    """When Stockfish was asked; what is shipped, or made by `generate_data.py`, brings its values along."""
    dataset, asked = str(summary["dataset"]), summary.get("best_move") == "engine"
    before = asked and dataset != "shipped" and not Path(dataset).is_dir()
    during = asked and bool(summary.get("self_play"))
    engine = f"Stockfish ({summary.get('engine_nodes', 0):,} nodes a position) valued"
    games = "positions of the policy's own games"
    if before:
        then = f"and {games} during it" if during else "no engine during it"
        return f"{engine} rows without values before training{',' if during else ';'} {then}"
    return f"during training {engine} {games}" if during else "no engine during training"


def fingerprint(identity: dict[str, Any]) -> str:
    """Twelve digits of the SHA-256 of all that decides what a run computes; see the identity of a run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _card(summary: dict[str, Any]) -> str:
    parts = [_metadata(summary), _head(summary), USAGE, _results(summary), _training(summary), LIMITS]
    return "\n\n".join(parts) + "\n"


def _metadata(summary: dict[str, Any]) -> str:
    """The YAML block that the Hub reads; a base model is named where it is one of the Hub's."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [chess, grpo, trl, rookworld]"]
    model = str(summary["model"])
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not Path(model).exists():
        lines.append(f"base_model: {model}")
    return "\n".join(["---", *lines, "---"])


def _head(summary: dict[str, Any]) -> str:
    return f"""# {Path(str(summary["model"])).name}, trained with GRPO

A chess language model with two tasks, chosen by the prompt's first letter. `P: <FEN>` asks for up to five candidate
moves, their evaluations and the best move; `A: <FEN>+<move>+<last moves, this one included>+` asks for the next
position, the reward and whether the game is over."""


def _results(summary: dict[str, Any]) -> str:
    table = [
        "| task | metric | decoding | before | after | change | trivial players | items |",
        "|---|---|---|---|---|---|---|---|",
        *(f"{_result(row)} {players_of(row) or '-'} | {row['items']} |" for row in summary["headline"]),
    ]
    lost: list[str] = []
    for of_what, rows in (("metrics", summary["metrics"]), (GROUPED, summary.get("groups"))):
        found, words = losses(rows or [], of_what)
        if found:
            lost += [
                f"{words}:",
                "",
                "| task | metric | decoding | before | after | change |",
                "|---|---|---|---|---|---|",
            ]
            lost += [*map(_result, found), ""]
        elif words:
            lost += [f"{words.replace('none', 'None', 1)}.", ""]
    unknown = "; ".join(summary.get("unknown_training") or ())
    earlier = f"; whether its start was trained on some is unknown, for this is: {unknown}" if unknown else ""
    return (
        f"## Results\n\nHeld-out items ({summary['eval_split']} split, none of whose positions this run trained on"
        f"{earlier}), shares in percent, paired 95 % intervals of the change. Skill is the value of the legal moves "
        "chosen, corrected for chance: 0 is a random legal mover, 1 the best move.\n\n"
        + "\n".join(table)
        + "\n\n### Significant losses\n\n"
        + "\n".join(lost).rstrip()
    )


def _result(row: Mapping[str, Any]) -> str:
    before, after = (as_text(row[name], row["format"]) for name in ("before", "after"))
    metric = " ".join([*([row["group"]] if "group" in row else []), row["metric"]])
    return f"| {row['task']} | {metric} | {row['mode']} | {before} | {after} | {changed(row)} |"


def _training(summary: dict[str, Any]) -> str:
    identity = summary.get("identity")
    data = f"`{summary['dataset']}`" + ("" if summary["dataset"] != "shipped" else " (comes with rookworld-trl)")
    if identity and (digests := identity.get("train_dataset")):  # by number of rows
        data += f", SHA-256 of the prompts in their order `{digests[max(digests, key=int)]}`"
    if report := summary.get("data_report"):
        data += f" ({'; '.join(report.splitlines())})"
    step, metric = summary.get("best_step"), summary.get("metric_for_best_model")
    items = [
        f"start: `{summary['model']}`"
        + (f" at {summary['model_revision']}" if summary.get("model_revision") else "")
        + (f", commit {summary['model_commit']}" if summary.get("model_commit") else ""),
        f"data: {data}; {summary['mix_env_ratio']:.0%} of the prompts of each batch were `A:`",
        f"rewards: {trained_on(summary)}",
        f"values of moves: no judge; {_engine(summary)}",
        f"steps: {summary['steps']}" + (f", stopped: {summary['stop_reason']}" if summary.get("stop_reason") else ""),
        *([f"weights: those after step {step}, the best on held-out rows by `{metric}`"] if step else []),
        f"command: `{summary['command']}`",
        f"seed: {summary['seed']}",
    ]
    if identity:
        items.append(
            f"config fingerprint: `{fingerprint(identity)}` (settings, data, starting weights, tokenizer, rewards)"
        )
    items.append("versions: " + ", ".join(f"{name} {number}" for name, number in summary["versions"].items()))
    return "## Training\n\n" + "\n".join(f"- {item}" for item in items)
