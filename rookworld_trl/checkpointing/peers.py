"""A sign of life from every process, so that none waits for ever for one that has stopped without ending.

A process that dies closes its connections, and the others' next collective raises. One that is stopped (SIGSTOP, a
debugger, a frozen machine, a network that swallows what is sent) does not: gloo waits without end, NCCL for its own
time. So each process writes a count into the group's store from a thread, however long a step or an evaluation takes,
and reads those of the others.
"""

import atexit
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from rookworld_trl.checkpointing.exits import UNRECOVERABLE

SILENCE_SECONDS = 300.0  # swapping, or a call that holds the interpreter, may take a while
BEAT_SECONDS = 5.0
_LEFT = b"left"


class PeerWatch:
    """Writes and reads the signs of life of one group until `leave`.

    Args:
        store: the group's, with a connection of its own: a wait elsewhere must not keep signs of life back.
        rank: this process.
        world_size: processes in all.
        limit: seconds of silence after which a process counts as stopped; counted while this one runs itself, so that
            a machine that sleeps ends nothing.
        beat: seconds between signs.
        give_up: called with what is known of the silent processes.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        limit: float = SILENCE_SECONDS,
        beat: float = BEAT_SECONDS,
        give_up: Callable[[Sequence[str], float], None] | None = None,
    ):
        self.store, self.rank, self.limit, self.beat = store, rank, limit, beat
        self.peers = [peer for peer in range(world_size) if peer != rank]
        self.give_up = give_up or _end_process
        self._seen: dict[int, bytes] = {}  # each one's last sign
        self._silence: dict[int, float] = {}  # seconds since then; of those that have begun and not left
        self._waited = 0.0  # seconds since the store last answered
        self._over = threading.Event()
        # Two threads: reading blocks for as long as the process that holds the store is stopped.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._count)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Tell the others that this process ends in order."""
        self._over.set()
        for thread in self._threads:  # none may be left when the interpreter ends: it aborts what it finds in C++
            thread.join(self.limit)
        with suppress(RuntimeError):  # the process that holds the store may have left before
            self.store.set(_key(self.rank), _LEFT)

    def _exchange(self) -> None:
        count, where = 0, f"process {self.rank} (pid {os.getpid()} on {socket.gethostname()})"
        try:
            while not self._over.is_set():
                count += 1
                self.store.set(_key(self.rank), f"{count} {where}")
                for peer in self.peers:
                    sign = self.store.get(_key(peer)) if self.store.check([_key(peer)]) else b""
                    if sign == _LEFT:
                        self._silence.pop(peer, None)
                    elif sign != self._seen.get(peer, b""):
                        self._seen[peer], self._silence[peer] = sign, 0.0
                self._waited = 0.0
                self._over.wait(self.beat)
        except RuntimeError:  # the process that holds the store is gone, which collectives notice by themselves
            self._over.set()

    def _count(self) -> None:
        while not self._over.wait(self.beat):
            for peer in list(self._silence):
                self._silence[peer] += self.beat
            self._waited += self.beat
            silent = sorted(peer for peer, seconds in self._silence.items() if seconds >= self.limit)
            named = [self._seen[peer].decode().partition(" ")[2] for peer in silent]
            if not named and self._waited >= self.limit + self.beat:  # stopped before its first sign was read
                named = ["process 0, which holds the group's store"]
            if named:
                self.give_up(named, self.limit)
                return


def _key(rank: int) -> str:
    return f"sign_of_life/{rank}"


def _end_process(silent: Sequence[str], seconds: float) -> None:
    """The main thread is in a collective, from which nothing brings it back."""
    text = (
        f"\nerror: no sign of life from {', '.join(silent)} for {seconds:.0f} s: stopped, or cut off. "
        "This process ends too. See to it, and start all of them again with `--auto_resume`\n"
    )
    os.write(2, text.encode())
    os._exit(UNRECOVERABLE)


_watch: PeerWatch | None = None


def watch_peers(limit: float) -> None:
    """Watch the other processes from here to the end of this one; nothing where there are none, or it is done already.

    Args:
        limit: seconds; `SILENCE_SECONDS` if that is less.
    """
    global _watch
    if _watch is not None or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    store: Any = _get_default_store()
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    _watch = PeerWatch(store.clone(), rank, world_size, min(limit, SILENCE_SECONDS))
    atexit.register(_watch.leave)
