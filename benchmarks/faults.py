"""Brings transient faults into small training runs and counts how many are recovered from.

    python -m benchmarks.faults [--runs 10] [--faults 10]

Kinds and steps are drawn at random, without looking at how close they come to each other beyond the healthy steps that
end a count: four in a row are meant to end a run. A fault counts as recovered if the step it hit was skipped, the
weights were finite after it and the run went on to its last step; a run is lost if it ended early. The same runs with
recovery off say what the faults would have done.
"""

import argparse
import json
import math
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.injection import STATE, Injector  # noqa: E402
from tests.support.toy import make_trainer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
KINDS = [
    "loss",
    "loss value",
    "gradient",
    "late gradient",
    "log-probs",
    "rewards",
    *STATE.keys() - {"value head", "baseline"},
]
GOOD_STEPS = 3


def plan(seed: int, faults: int) -> list[tuple[int, int, str]]:
    """Faults at random steps, `GOOD_STEPS` to four times that apart."""
    dice, step, planned = random.Random(seed), 0, []
    for kind in (dice.choice(sorted(KINDS)) for _ in range(faults)):
        step += dice.randint(GOOD_STEPS + 1, 4 * GOOD_STEPS)
        planned.append((0, step, kind))
    return planned


def run(seed: int, faults: int, recovery: bool, folder: Path) -> dict[str, Any]:
    """One run; what became of its faults."""
    planned = plan(seed, faults)
    last = planned[-1][1] + GOOD_STEPS
    trainer = make_trainer(folder, max_steps=last, save_strategy="no", recovery=recovery, seed=seed)
    trainer.remove_callback(PrinterCallback)
    injector, started = Injector(trainer, planned), time.perf_counter()
    try:
        trainer.train()
        error = ""
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    path = folder / "recovery.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    skipped = {event["step"] for event in events}
    hit = [step for _, step, _ in planned if step <= len(injector.finite) + 1]
    return {
        "faults": len(hit),
        "recovered": sum(step in skipped and injector.finite.get(step, False) and not error for step in hit),
        "skipped_without_a_fault": len(skipped - set(hit)),
        "steps": len(injector.finite),
        "steps_with_broken_weights": sum(not finite for finite in injector.finite.values()),
        "lost": bool(error) or trainer.state.global_step < last,
        "seconds": time.perf_counter() - started,
    }


def total(runs: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(each[name] for each in runs) for name in runs[0]}
    lost = sums.pop("lost")
    rate = sums["recovered"] / sums["faults"] if sums["faults"] else math.nan
    return {"runs": len(runs), "runs_lost": lost, "recovery_rate": rate, **sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--faults", type=int, default=10, help="in each run")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "kinds": sorted(KINDS)}
    for name, recovery in (("recovery on", True), ("recovery off", False)):
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            runs = [run(seed, options.faults, recovery, Path(folder) / str(seed)) for seed in range(options.runs)]
        results[name] = total(runs)
        print(f"{name}: {results[name]}", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
