"""The model card of a trained checkpoint, written from the run's summary: what it is, what it reached, how to use."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rookworld_trl.measuring.comparison import losses
from rookworld_trl.measuring.tables import as_text, changed, players_of
from rookworld_trl.reports.run import GROUPED, read_summary

REWARDS = {
    "graduated": "six levels from -0.3 (unparsable) to 1.0 (the best answer, or nearly; the exact one)",
    "continuous": (
        "from -0.3 (unparsable) to 1.0, by what move, candidates and evals gain over chance, or by the FEN's similarity"
    ),
}
DECISIONS = "what every legal move adds to `continuous`, and 1 for the right answer, summed exactly"


def write_card(run: Path, checkpoint: Path) -> Path:
    """Write the checkpoint's README.md from the run's `summary.json`, and return its path."""
    summary, path = read_summary(run), checkpoint / "README.md"
    model = str(summary["model"])
    # A base model is named where it is one of the Hub's.
    of_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not Path(model).exists()
    compared = [losses(summary["metrics"], "metrics"), losses(summary.get("groups") or (), GROUPED)]
    environment = Environment(
        loader=PackageLoader("rookworld_trl.reports"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md.jinja").render(
        base_model=model if of_hub else "",
        name=Path(model).name,
        eval_split=summary["eval_split"],
        unknown_training=summary.get("unknown_training") or (),
        headline=summary["headline"],
        losses=[(words, rows) for rows, words in compared if words],
        facts=list(_facts(summary)),
        cells=_cells,
        players=players_of,
    )
    path.write_text(text, encoding="utf-8")
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


def fingerprint(identity: dict[str, Any]) -> str:
    """Twelve digits of the SHA-256 of all that decides what a run computes; see the identity of a run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _cells(row: Mapping[str, Any]) -> str:
    """A row of a table of changes."""
    before, after = (as_text(row[name], row["format"]) for name in ("before", "after"))
    metric = f"{row.get('group', '')} {row['metric']}".strip()
    return f"| {row['task']} | {metric} | {row['mode']} | {before} | {after} | {changed(row)} |"


def _facts(summary: Mapping[str, Any]) -> Iterator[str]:
    """How it was trained, a fact a line."""
    identity, model = summary.get("identity"), f"start: `{summary['model']}`"
    model += f" at {summary['model_revision']}" if summary.get("model_revision") else ""
    yield model + (f", commit {summary['model_commit']}" if summary.get("model_commit") else "")
    data = f"data: `{summary['dataset']}`" + ("" if summary["dataset"] != "shipped" else " (comes with rookworld-trl)")
    if identity and (digests := identity.get("train_dataset")):  # by number of rows
        data += f", SHA-256 of the prompts in their order `{digests[max(digests, key=int)]}`"
    if report := summary.get("data_report"):
        data += f" ({'; '.join(report.splitlines())})"
    yield f"{data}; {summary['mix_env_ratio']:.0%} of the prompts of each batch were `A:`"
    yield f"rewards: {trained_on(summary)}"
    engine = f"Stockfish ({summary.get('engine_nodes', 0):,} nodes a position) where a row brings none"
    yield f"values of moves: {engine if summary.get('best_move') == 'engine' else 'those that the rows bring'}"
    yield f"steps: {summary['steps']}" + (f", stopped: {summary['stop_reason']}" if summary.get("stop_reason") else "")
    if step := summary.get("best_step"):
        metric = summary.get("metric_for_best_model")
        yield f"weights: those after step {step}, the best on held-out rows by `{metric}`"
    yield f"command: `{summary['command']}`"
    yield f"seed: {summary['seed']}"
    if identity:
        of_what = "settings, data, starting weights, tokenizer, rewards"
        yield f"config fingerprint: `{fingerprint(identity)}` ({of_what})"
    yield "versions: " + ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
