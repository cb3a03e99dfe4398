"""Folders as runs leave them, for reports: logs and summaries written by hand, evaluations by the package."""

import json
from pathlib import Path
from typing import Any

import chess

from rookworld_trl.chess import environment
from rookworld_trl.chess.accuracy import score
from rookworld_trl.measuring import write_results

START = chess.Board().fen()
MATE = "6k1/5ppp/8/8/8/8/8/R5K1 w - - 0 1"  # Ra8 mates
SETTINGS = {"temperature": 1.0, "max_new_tokens": 80}


def policy_row(fen: str, best: str) -> dict:
    moves = sorted(move.uci() for move in chess.Board(fen).legal_moves)
    values = [500 if move == best else 0 for move in moves]
    return {"prompt": f"P: {fen}", "task": "policy", "target": "", "legal_moves": moves, "legal_cp": values} | {
        "stratum": "endgame" if fen == MATE else "opening"
    }


def environment_row(fen: str, move: str) -> dict:
    target = environment.format_completion(environment.transition(fen, move))
    row = {"prompt": f"A: {fen}+{move}+{move}+", "task": "environment", "target": target, "stratum": "quiet"}
    return row | {"legal_moves": [], "legal_cp": []}


ROWS = [policy_row(START, "e2e4"), policy_row(MATE, "a1a8"), environment_row(START, "e2e4")]
RIGHT = ROWS[2]["target"]
COPIED = f"{START}+0.001+0+0"
BEFORE = [" M: d2d4 E: 0.1 B: d2d4", " M: a1a9 E: 0.1 B: a1b2", COPIED]
AFTER = [" M: e2e4 d2d4 E: 0.1 0.1 B: e2e4", " nothing", RIGHT]


def write_evaluation(folder: Path, name: str, completions: list[str]) -> None:
    """Write the evaluation of the three rows as the package itself does."""
    write_results(folder / f"evaluation_{name}.parquet", score(ROWS, completions, settings=SETTINGS))


def comparison(**changes: Any) -> dict[str, Any]:
    row = {
        "task": "policy",
        "mode": "greedy",
        "metric": "best_value",
        "label": "win-chance value of B",
        "headline": True,
        "format": "percent",
        "before": 0.7,
        "after": 0.75,
        "difference": 0.05,
        "ci_low": 0.02,
        "ci_high": 0.08,
        "items": 500,
        "clusters": 500,
        "significant": True,
        "better": 1,
        "loss": False,
        "baselines": {},
        "baselines_after": {},
    }
    return {**row, **changes}


def write_run(folder: Path) -> Path:
    """Forty steps and a summary of six metrics."""
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            row = {"step": step, "reward": 0.01 * step, "kl": 0.001 * step, "groups/informative": 0.75}
            row |= {"reward/policy": 0.02 * step, "reward/environment": 0.5}
            file.write(json.dumps(row) + "\n")
    rows = [
        comparison(),
        comparison(metric="n_candidates", label="candidates", headline=False, format=".2f", before=4.0, after=4.5),
        comparison(task="environment", metric="exact", label="exact | <b>"),
        comparison(
            metric="top1",
            label="B is best",
            headline=False,
            before=0.086,
            after=0.073,
            difference=-0.013,
            ci_low=-0.0243,
            ci_high=-0.0013,
            loss=True,
            baselines={"random legal": 0.09},
            baselines_after={"random legal": 0.09},
        ),
        comparison(metric="tokens", difference=-3.0, ci_low=-4.0, ci_high=-2.0, format=".1f", better=0),
        comparison(metric="f1", before=None, difference=None, ci_low=None, ci_high=None, significant=False),
    ]
    groups = [comparison(group="color=white"), comparison(group="stratum=check", loss=True)]
    summary = {
        "groups": groups,
        "metrics": rows,
        "seconds": {"train": 60.0, "evaluate": 15.5},
        "seed": 3,
        "config": {"beta": 0.04},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
