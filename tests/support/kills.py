"""Kills a small training run at random moments, restarts it each time, and compares its end with an undisturbed run.

    python -m tests.support.kills FOLDER KILLS STEPS     prints what became of the runs, as JSON

SIGKILL cannot be caught, so nothing gets the chance to tidy up. Half of the kills come at any time, half while a
checkpoint is being written. A run counts as lost if it cannot be started again, starts from the beginning although it
had saved, or ends with a last checkpoint that differs in a single bit (times aside). Each run is a fork of a server
that has imported the libraries and never computes.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.resume import choose_start
from tests.support.checkpoint_diff import IGNORED, differences
from tests.support.toy import make_trainer

# Mid-cycle steps, two epochs, accumulation, a moving KL coefficient, a checkpoint at every step, few kept.
OPTIONS: dict[str, Any] = {
    "rows": 24,
    "max_steps": 24,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "shuffle_dataset": True,
    "kl_control": "multiplicative",
    "kl_interval": 2,
    "save_total_limit": 2,
}


CONTEXT = multiprocessing.get_context("forkserver")


def train(output_dir: Path, options: dict[str, Any]) -> None:
    """What a user's program does: build, find where to start, train. Its output goes to a file beside the folder."""
    log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    trainer = make_trainer(output_dir, auto_resume=True, **options)
    start = choose_start(trainer.args)
    print(f"starting from {start.checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=start.checkpoint)


def run(output_dir: Path, options: dict[str, Any], seconds: float = 1e9, while_saving: bool = False) -> int | None:
    """Train in a process that is killed after `seconds`, or in a save after that; its exit code, None if it was."""
    process = CONTEXT.Process(target=train, args=(output_dir, options))
    process.start()
    deadline = time.monotonic() + seconds
    while process.is_alive():
        saving = while_saving and any(output_dir.glob(f"{store.STAGING}*"))
        if time.monotonic() >= deadline and (saving or not while_saving):
            time.sleep(random.uniform(0, 0.03) if saving else 0)
            process.kill()
            process.join()
        time.sleep(0.001)
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


def campaign(kills: int, folder: Path, options: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Runs killed again and again until `kills` is reached and the last of them has come to its end."""
    random.seed(seed)
    last = f"checkpoint-{options['max_steps']}"
    imports = CONTEXT.Process(target=time.time)  # whose time is not counted
    imports.start()
    imports.join()
    started = time.monotonic()
    if run(folder / "undisturbed", options):
        raise RuntimeError(f"the undisturbed run failed; see {folder / 'undisturbed.log'}")
    duration = time.monotonic() - started
    result: dict[str, Any] = {"kills": 0, "kills_while_saving": 0, "runs": 0, "lost": []}
    while result["kills"] < kills:
        output_dir = folder / f"run-{result['runs']}"
        result["runs"] += 1
        while True:
            had = store.newest_valid(output_dir)
            if had is None and store.list_checkpoints(output_dir):
                result["lost"].append(f"{output_dir.name}: no checkpoint verifies")
                break
            while_saving = random.random() < 0.5
            # Once there have been enough, the last run may finish.
            patience = random.uniform(0, duration) if result["kills"] < kills else 1e9
            status = run(output_dir, options, patience, while_saving)
            if status is None:
                result["kills"] += 1
                result["kills_while_saving"] += while_saving
                continue
            if status:
                result["lost"].append(f"{output_dir.name}: exit status {status}; see its log")
            elif found := differences(folder / "undisturbed" / last, output_dir / last, (*IGNORED, "run_id")):
                result["lost"].append(f"{output_dir.name}: {found[0]} and {len(found) - 1} other differences")
            break
    result |= {"steps_a_run": options["max_steps"], "seconds": round(time.monotonic() - started, 1)}
    return result


if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["tests.support.toy", "rookworld_trl.checkpointing.resume"])
    print(json.dumps(campaign(int(sys.argv[2]), Path(sys.argv[1]), OPTIONS | {"max_steps": int(sys.argv[3])})))
