"""How many completions a second do the rewards score on one core?

    python -m benchmarks.scoring [--rows 6000] [--repeats 5] [--output benchmarks/results/scoring.json]

Scores the true completion, a damaged one and an unparsable one of each row in turn, through the TRL reward functions,
every row once per pass (no prompt is met twice within the scorer's cache), and counts CPU seconds, so that other work
on the machine does not show. Rows come from the shipped data where it is installed, else from random games with
made-up values: the work per row is the same.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chess

from benchmarks.common import RESULTS, machine, write_report
from rookworld_trl import rewards
from rookworld_trl.data import load_shipped
from rookworld_trl.tasks import environment, policy

OUTPUT = RESULTS / "scoring.json"
Columns = dict[str, list[Any]]


def shipped_rows() -> list[dict[str, Any]]:
    """Rows of the shipped train split; none where the package comes without data."""
    try:
        return list(load_shipped("train"))
    except FileNotFoundError:
        return []


def random_rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random games with values made up, in the columns of the shipped data."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        board = chess.Board()
        while len(rows) < count and not board.is_game_over():
            fen, legal = board.fen(), sorted(move.uci() for move in board.legal_moves)
            move = rng.choice(legal)
            values = [rng.randint(-300, 300) for _ in legal]
            if task == "environment":
                past = [played.uci() for played in board.move_stack]
                target = environment.format_completion(environment.transition(fen, move))
                rows.append({"prompt": environment.prompt(fen, move, past), "target": target})
            else:
                top = sorted(zip(values, legal, strict=True), reverse=True)[: policy.MAX_CANDIDATES]
                evals = [policy.format_eval(value) for value, _ in top]
                target = policy.format_completion([uci for _, uci in top], evals, top[0][1])
                rows.append({"prompt": policy.prompt(fen), "target": target, "legal_moves": legal, "legal_cp": values})
            board.push_uci(move)
    return rows


def damaged(row: dict[str, Any], index: int) -> str:
    """The truth, the truth with one character exchanged, or an unparsable text, in turn."""
    target = row["target"]
    if index % 3 == 0:
        return target
    middle = len(target) // 2
    return target[:middle] + ("1" if index % 3 == 1 else "?") + target[middle + 1 :]


def measure(function: Callable[..., list[float | None]], rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Median and range of rows per second over `repeats` passes of batches of 64."""
    completions = [damaged(row, index) for index, row in enumerate(rows)]
    batches = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        columns: Columns = {name: [row[name] for row in part] for name in part[0] if name != "prompt"}
        batches.append(([row["prompt"] for row in part], completions[start : start + 64], columns))
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        for prompts, texts, columns in batches:
            function(prompts=prompts, completions=texts, **columns)
        rates.append(len(rows) / (time.process_time() - started))
    return {
        "rows": len(rows),
        "repeats": repeats,
        "rows_per_second_median": round(statistics.median(rates)),
        "rows_per_second_min": round(min(rates)),
        "rows_per_second_max": round(max(rates)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6000, help="rows per task")
    parser.add_argument("--repeats", type=int, default=5, help="passes over the rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    shipped = shipped_rows()
    results: dict[str, Any] = {}
    for task, functions in {
        "environment": (rewards.environment_reward, rewards.environment_reward_continuous),
        "policy": (rewards.policy_reward, rewards.policy_reward_continuous),
    }.items():
        rows = [row for row in shipped if row["task"] == task][: arguments.rows]
        source = "shipped" if rows else "random games"
        rows = rows or random_rows(task, arguments.rows)
        for function in functions:
            results[function.__name__] = measure(function, rows, arguments.repeats) | {"source": source}
            print(f"{function.__name__:32} {results[function.__name__]['rows_per_second_median']:>8,} rows/s")
    # Without stored targets python-chess computes the truth of every row: the slow path, for comparison.
    rows = random_rows("environment", min(arguments.rows, 1000), seed=1)
    results["environment_reward_without_targets"] = measure(_without_targets, rows, 1) | {"source": "random games"}

    report = {
        "unit": "completions per CPU second, one core",
        "results": results,
        "python": platform.python_version(),
        **machine("cpu"),
    }
    write_report(arguments.output, report)
    print(f"written to {arguments.output}")


def _without_targets(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return rewards.environment_reward(prompts, completions, target=[None] * len(prompts))


if __name__ == "__main__":
    main()
