"""Keep trials of the demo's settings: what runs on dev gained and lost, beside their settings, in one file.

    accelerate launch recipes/grpo.py --config recipes/nano/grpo/config_cpu_exact.yaml --eval_split dev \\
        --eval_policy_items 1200 --eval_environment_items 300 --max_steps 120 --output_dir runs/trials/rate_4e-4 \\
        --learning_rate 4e-4
    python -m benchmarks.trials runs/trials/* [--about "what was changed"]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, write_report

OUTPUT = RESULTS / "demo_trials.json"
KEPT = ("before", "difference", "ci_low", "ci_high", "items")
SETTINGS = ("learning_rate", "beta", "num_generations", "mix_env_ratio", "policy_strata", "steps", "seed")


def trial(folder: Path) -> dict[str, Any]:
    """Settings of a run, and each metric's change.

    Raises:
        SystemExit: it was measured on test, which no setting may be chosen by.
    """
    summary = json.loads((folder / "summary.json").read_text())
    if summary["eval_split"] != "dev":
        raise SystemExit(
            f"{folder}: measured on {summary['eval_split']}; settings are chosen on dev (--eval_split dev)"
        )
    metrics: dict[str, Any] = {}
    for each in summary["metrics"]:
        place = metrics.setdefault(f"{each['task']}, {each['mode']}", {})
        place[each["metric"]] = {name: _short(each[name]) for name in KEPT} | {"loss": each["loss"]}
    start = summary["identity"]["starting_weights"][:16]
    return {name: summary.get(name) for name in SETTINGS} | {"start": start, "metrics": metrics}


def _short(value: float | None) -> float | None:
    return value if value is None else round(value, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--about", default="", help="what no setting says, of all these runs")
    arguments = parser.parse_args()
    kept = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"split": "dev", "trials": {}}
    for folder in arguments.runs:
        kept["trials"][folder.name] = {"about": arguments.about, **trial(folder)}
    write_report(OUTPUT, kept)


if __name__ == "__main__":
    main()
