"""Do prompts from the policy's own games teach more than the shipped ones? The same recipe, for the same CPU time.

    python -m benchmarks.selfplay --minutes 3 --seeds 1 --policy-items 600 --environment-items 400

The sampled recipe on shipped prompts, and with positions of its own games in their places; each starts from the
shipped weights and trains until its CPU time is used up, that of the games and of Stockfish included. Then both answer
the same dev items, compared pair by pair. What was measured stays in `--folder`: run it again and it goes on there.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, machine, shipped, write_report
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.sizes import NANO
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.evaluation import Evaluation, compare, comparison_table, evaluate
from rookworld_trl.modeling.loading import NANO_FOLDER, load

OUTPUT = RESULTS / "selfplay.json"
SIDES = ("sampled", "selfplay")
HEADLINES = ("best_legal", "skill", "exact")


def trained(side: str, seed: int, arguments: argparse.Namespace) -> tuple[dict[str, Any], Evaluation]:
    """What a side spent, and how its model does on dev: measured, or read where that was done before."""
    items = f"{arguments.policy_items}-{arguments.environment_items}"
    path = arguments.folder / f"{side}-{arguments.minutes:g}min-seed{seed}-{items}.json"
    if not path.exists():
        budget, size = Budget(60 * arguments.minutes), replace(NANO, folder=Path(arguments.start))
        with tempfile.TemporaryDirectory() as folder:
            model = ARMS[side].train(size, Path(folder), budget, seed)
        limits = {"policy": arguments.policy_items, "environment": arguments.environment_items}
        settings: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 80, "batch_size": 128, "seed": 1}
        rows = draw_of_each(shipped("dev"), limits)
        measured = evaluate(model, load(arguments.start)[1], rows, **settings)
        spent = {"steps": len(budget.curve), "samples": budget.samples, "cpu_seconds": budget.curve[-1][0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_report(path, {"spent": spent, "evaluation": measured.to_dict()})
    found = json.loads(path.read_text())
    return found["spent"], Evaluation.from_dict(found["evaluation"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="CPU minutes of training, of each side")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--policy-items", type=int, default=600)
    parser.add_argument("--environment-items", type=int, default=400)
    parser.add_argument("--start", default=str(NANO_FOLDER), help="checkpoint that both start from")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "selfplay")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report: dict[str, Any] = {"minutes": arguments.minutes, "split": "dev", **machine("cpu"), "seeds": {}}
    for seed in arguments.seeds:
        sides = [trained(side, seed, arguments) for side in SIDES]
        rows = compare(*(evaluation for _, evaluation in sides))
        headlines = [row for row in rows if row["metric"] in HEADLINES]
        print(f"seed {seed}: shipped prompts (before) against its own games' (after)\n{comparison_table(headlines)}")
        spent = {side: each for side, (each, _) in zip(SIDES, sides, strict=True)}
        report["seeds"][seed] = {**spent, "headlines": headlines, "losses": [row for row in rows if row["loss"]]}
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
