"""The first of two processes works for longer than the group's time limit; see test_waiting.py."""

import os
import sys
import time
from datetime import timedelta

from torch import distributed

from rookworld_trl.checkpointing.exits import others_wait
from tests.faults.gloo import leave

LIMIT, WORK = 2, 5  # seconds


def main(how: str) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    first = distributed.get_rank() == 0
    if how == "barrier":
        time.sleep(WORK * first)
        distributed.barrier()
    else:
        with others_wait():
            time.sleep(WORK * first)
            if first and how == "dies":
                os._exit(3)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
