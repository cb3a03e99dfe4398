"""A process that is stopped, not dead, ends the others in time; one that is busy, late or done does not."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from rookworld_trl.checkpointing.peers import PeerWatch
from tests.support.injection import train
from tests.support.processes import ALONE, ROOT, command


def test_the_silent_one_is_named_and_no_other() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: dict[int, list[Sequence[str]]] = {rank: [] for rank in range(4)}

    def watch(rank: int) -> PeerWatch:
        def give_up(silent: Sequence[str], seconds: float) -> None:
            assert seconds == 1.0
            found[rank].append(silent)

        return PeerWatch(store.clone(), rank, 5, limit=1.0, beat=0.02, give_up=give_up)  # the fifth never begins

    watches = [watch(rank) for rank in range(4)]
    time.sleep(1.5)
    watches[1].leave()
    time.sleep(1.5)
    assert not any(found.values())
    watches[2]._over.set()  # no more signs, and no word of leaving
    deadline = time.monotonic() + 30
    while not (found[0] and found[3]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found[1] == found[2] == []
    for rank in (0, 3):
        ((named,),) = found[rank]
        assert named.startswith(f"process 2 (pid {os.getpid()} on ")
    for left in watches:
        left.leave()
        assert not any(thread.is_alive() for thread in left._threads)


def test_without_its_store_a_watch_ends_and_says_nothing() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: list[Sequence[str]] = []
    watches = [PeerWatch(store.clone(), rank, 2, 1.0, 0.02, lambda silent, _: found.append(silent)) for rank in (0, 1)]
    time.sleep(0.2)
    del store
    time.sleep(1.5)
    for watch in watches:
        watch.leave()
    assert found == []


def test_a_store_that_never_answers_counts_as_silence() -> None:
    """Whoever holds it may stop before any sign of its life was read."""
    answers = threading.Event()

    class Stopped:
        def set(self, *_: object) -> None:
            answers.wait(60)
            raise RuntimeError("gone")

    found: list[Sequence[str]] = []
    watch = PeerWatch(Stopped(), 1, 2, limit=0.2, beat=0.02, give_up=lambda silent, _: found.append(silent))
    deadline = time.monotonic() + 30
    while not found and time.monotonic() < deadline:
        time.sleep(0.02)
    answers.set()
    watch.leave()
    assert found == [["process 0, which holds the group's store"]]


def start(folder: Path, rank: int, port: int, plan: list[tuple[int, int, str]]) -> subprocess.Popen:
    """One of two processes, without a launcher, whose exit codes would be its own; the first one holds the store."""
    environment = {**os.environ, **ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = command(train, folder, plan, {"max_steps": 4, "save_strategy": "no", "ddp_timeout": 30})
    return subprocess.Popen([sys.executable, *words], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_does_not_hang_the_other(tmp_path: Path, stopped: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(tmp_path, rank, port, [(stopped, 2, "stop")]) for rank in (0, 1)]
    try:
        _, error = processes[1 - stopped].communicate(timeout=400)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert processes[1 - stopped].returncode == 4
    last = error.strip().splitlines()[-1]
    known = f"process {stopped} (pid {processes[stopped].pid} on "
    assert f"error: no sign of life from {known}" in last or (stopped == 0 and "process 0, which holds the" in last)
    assert "for 30 s" in last
    assert "`--auto_resume`" in last


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_stopped_for_longer_go_on(tmp_path: Path) -> None:
    """As Ctrl-Z and `fg`, or a laptop that sleeps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plan = [(rank, 2, "stop") for rank in (0, 1)]
    processes = [start(tmp_path, rank, port, plan) for rank in (0, 1)]
    try:
        for process in processes:
            state = ""
            while state != "T":
                time.sleep(0.1)
                state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        time.sleep(40)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        ends = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
