"""Several engines at work on a list of positions, and a cache of their answers that outlives the run."""

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import chess

from rookworld_trl.chess.engine import Engine, MoveValue

logger = logging.getLogger(__name__)

BUSY_SECONDS = 30.0  # how long a process waits for another one that is writing to the same cache


class ValueCache:
    """Engine answers on disk, in one SQLite file that processes can share; bounded, least recently used out first.

    A damaged answer or page is a miss, and so is a file that another process locks for too long: what cannot be read is
    asked of the engine again, and what cannot be written is not kept.

    Args:
        path: the file; it and its directory are made.
        size: answers kept, to within a hundredth.

    Raises:
        ValueError: the file is no cache or cannot be written, or `size` is below 1.
    """

    def __init__(self, path: Path | str, size: int = 1_000_000):
        if size < 1:
            raise ValueError(f"the size of {path} is {size}: keep at least one answer, or use no cache")
        self.path, self.size = Path(path), size
        self._lock = threading.Lock()
        self._complained = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: each statement is a transaction of its own.
            self._db = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last answers, never the file
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, used INTEGER, answer TEXT)")
            self._db.execute("CREATE INDEX IF NOT EXISTS by_use ON answers (used)")
            self._uncounted = 0  # puts since the answers were counted, which reads the whole index
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"{path}: cannot be used as a cache of engine values ({error}); give another file"
            ) from error

    def get(self, key: str) -> list[MoveValue] | None:
        """The answer, now the most recently used one; None if it isn't there or damaged."""
        row = self._row("SELECT answer FROM answers WHERE key = ?", key)
        values = None if row is None else _read_answer(row[0])
        if values is not None:
            self._row("UPDATE answers SET used = ? WHERE key = ?", time.time_ns(), key)
        return values

    def put(self, key: str, values: Sequence[MoveValue]) -> None:
        """Keep an answer; where there are more than `size`, a tenth of them goes, so that it is seldom done."""
        text = json.dumps([astuple(value)[:3] for value in values], separators=(",", ":"))
        self._row("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", key, time.time_ns(), text)
        self._uncounted += 1
        if self._uncounted * 100 < self.size:
            return
        self._uncounted = 0
        surplus = len(self) - self.size
        if surplus > 0:
            oldest = "SELECT key FROM answers ORDER BY used LIMIT ?"
            self._row(f"DELETE FROM answers WHERE key IN ({oldest})", surplus + self.size // 10)

    def __len__(self) -> int:
        return int((self._row("SELECT COUNT(*) FROM answers") or (0,))[0])

    def _row(self, statement: str, *values: Any) -> Any:
        """A statement's first row; None where there is none or the database cannot do it, which is said once."""
        with self._lock:
            try:
                return self._db.execute(statement, values).fetchone()
            except sqlite3.Error as error:
                if not self._complained:
                    logger.warning(
                        f"{self.path}: damaged, locked or full ({error}): the engine is asked instead. Delete the file "
                        "if this comes again"
                    )
                self._complained = True
                return None

    def close(self) -> None:
        self._db.close()


def _read_answer(text: Any) -> list[MoveValue] | None:
    """None unless it is a list of [move, centipawns, mate or None]."""
    try:
        values = [MoveValue(move, centipawns, mate) for move, centipawns, mate in json.loads(text)]
    except (ValueError, TypeError):
        return None
    sound = (type(v.move) is str and type(v.centipawns) is int and type(v.mate) in (int, type(None)) for v in values)
    return values if all(sound) else None


class EnginePool:
    """`workers` engines that share a list of positions. Use it with `with`.

    Each search starts with a cleared hash table, so a value does not depend on which engine it came from, nor on what
    that engine had searched before.

    Args:
        workers: engine processes; each is driven by a thread that mostly waits for it.
        nodes: nodes to search for a position.
        cache: answers of earlier runs, by engine, limit, number of moves and FEN; None: no such cache.
        options: more arguments of `Engine`.
    """

    def __init__(self, workers: int, *, nodes: int, cache: ValueCache | None = None, **options: Any):
        if workers < 1:
            raise ValueError(f"`workers` is {workers}: a pool needs at least one engine")
        self._engines = [Engine(nodes=nodes, cache_size=0, **options) for _ in range(workers)]
        self._limit = f"nodes {nodes}"
        self._cache = cache
        self._idle: SimpleQueue[Engine] = SimpleQueue()
        self._running = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:  # if one does not start, those before it end
            for engine in self._engines:
                self._idle.put(starting.enter_context(engine))
            self._threads = starting.enter_context(ThreadPoolExecutor(len(self._engines)))
            self._running = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._running.close()

    def values(self, fens: Sequence[str], multipv: int = 500) -> Iterator[list[MoveValue] | None]:
        """Values of each position's moves, as `Engine.analyse` gives them, in the order of `fens`.

        `multipv` moves are valued, by default every legal one. A None (an illegal position, or an engine that failed
        twice) is not kept in the cache.
        """
        yield from self._threads.map(lambda fen: self._value(fen, multipv), fens)

    def _value(self, fen: str, multipv: int) -> list[MoveValue] | None:
        engine = self._idle.get()
        try:
            key = f"{engine.name}|{self._limit}|{multipv}|{fen}"
            found = self._cache.get(key) if self._cache is not None else None
            if found is not None:
                return found
            values = engine.analyse(chess.Board(fen), multipv=multipv, game=object())
            if values is not None and self._cache is not None:
                self._cache.put(key, values)
            return values
        finally:
            self._idle.put(engine)
