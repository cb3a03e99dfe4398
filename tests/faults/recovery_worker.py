"""Trains the toy task with faults by (process, step) under torchrun, and writes what each process saw."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.gloo import leave
from tests.faults.injection import Injector
from tests.faults.toy import make_trainer


def main(folder: Path, plan: list[tuple[int, int, str]], options: dict[str, Any]) -> None:
    trainer = make_trainer(folder, per_device_train_batch_size=2, ddp_backend="gloo", **options)
    injector = Injector(trainer, [(rank, step, kind) for rank, step, kind in plan])
    error, started = "", time.monotonic()
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    result = {
        "error": error,
        "seconds": time.monotonic() - started,
        "hashes": list(injector.hashes.values()),
        "finite": all(injector.finite.values()),
        "attempts": trainer.guard.attempts.count,
    }
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(result), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
    leave()
