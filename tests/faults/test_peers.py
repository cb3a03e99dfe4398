"""A process that is stopped, not dead, ends the others at the time limit of their collectives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.injection import train
from tests.support.processes import ALONE, ROOT, command

LIMIT = 10  # seconds


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_process_does_not_hang_the_other(tmp_path: Path) -> None:
    """Without a launcher, which would end both. The stopped one holds the group's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command(train, tmp_path, [(0, 2, "stop")], {"max_steps": 4, "save_strategy": "no", "ddp_timeout": LIMIT})
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = []
    for rank in ("0", "1"):
        environment = {**os.environ, **ALONE, **group, "RANK": rank, "LOCAL_RANK": rank}
        started = subprocess.Popen(
            [sys.executable, *words], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        both.append(started)
    try:
        both[1].communicate(timeout=400)
    finally:
        for process in both:
            process.kill()
    assert both[1].returncode == 1
    assert f"Timed out waiting {LIMIT}000ms" in (tmp_path / "rank-1.json").read_text()
