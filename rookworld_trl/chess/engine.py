"""Stockfish (or any UCI engine) behind a context manager: fixed work, a hard time limit, one restart.

A fixed node count makes values repeatable; the time limit is only a guard, because python-chess waits for
ever on a hung engine unless `Limit.time` is set. An engine that hangs or dies is killed and started again, and the
position is tried once more; then the answer is None and the caller goes on. Several engines share a list of positions
(`EnginePool`), and their answers outlive the run (`ValueCache`).
"""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Self, TypeVar

import chess
import chess.engine

logger = logging.getLogger(__name__)

MATE_CENTIPAWNS = 10_000
ENV_PATH = "STOCKFISH_PATH"
BUSY_SECONDS = 30.0  # how long a process waits for another one that is writing to the same cache
Answer = TypeVar("Answer")


class MoveValue(NamedTuple):
    """An engine's value of a move (UCI), from the mover's side; a mate in n moves is +-(10000 - n)."""

    move: str
    centipawns: int


def find_engine(path: str | None = None) -> str:
    """The engine's executable: `path`, else $STOCKFISH_PATH, else `stockfish` on PATH or in /usr/games.

    Raises:
        FileNotFoundError: naming what was looked for and how to fix it.
    """
    asked = path or os.environ.get(ENV_PATH)
    wanted = asked or "stockfish"
    # An engine that was asked for by path is never replaced by another one.
    found = shutil.which(wanted) or (None if asked else shutil.which(wanted, path="/usr/games:/usr/local/bin"))
    if found is None:
        raise FileNotFoundError(
            f"engine '{wanted}' was not found or cannot be executed; install Stockfish (apt-get install stockfish) "
            f"or give its path by the engine's path setting or ${ENV_PATH}"
        )
    return found


class Engine:
    """A UCI engine that costs at most a None.

    The process starts on `__enter__` and ends on `__exit__`: always use `with`, since python-chess's thread would
    otherwise keep a raising program alive.

    Args:
        path: executable; see `find_engine`.
        nodes: nodes to search for a position.
        timeout: seconds one search may take before the engine counts as hung.
        hash_mb: hash table in MiB.
    """

    def __init__(self, path: str | None = None, *, nodes: int, timeout: float = 10.0, hash_mb: int = 16):
        self.path = find_engine(path)
        self.limit = chess.engine.Limit(nodes=nodes, time=timeout)
        self.timeout = timeout
        self.name = ""  # what the engine calls itself, with its version, once it runs
        self._options = {"Threads": 1, "Hash": hash_mb}
        self._process: chess.engine.SimpleEngine | None = None
        self._open = False

    def __enter__(self) -> Self:
        self._start()
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._kill()

    def analyse(self, board: chess.Board, multipv: int = 5, game: object = None) -> list[MoveValue] | None:
        """Values of the best `multipv` legal moves, best first; every legal move when there are fewer.

        Args:
            board: the position; its move stack is not sent, so repetitions are not seen.
            multipv: how many moves to value.
            game: searches with an equal `game` share the hash table; a new one clears it (for repeatable values).

        Returns:
            None when the position is illegal (an engine would crash on it or make values up), or when the engine
            failed twice. An empty list when the game is over.
        """
        return self._ask(board, lambda process: self._search(process, board, multipv, game))

    def play(self, board: chess.Board) -> str | None:
        """The move that the engine plays, in UCI, with an empty hash table, so that it follows from the game alone.

        The board's move stack is sent too, by which the engine sees repetitions. None as in `analyse`.
        """

        def ask(process: chess.engine.SimpleEngine) -> str:
            move = process.play(board, self.limit, game=object()).move
            if move is None:
                raise chess.engine.EngineError("the engine named no move")
            return move.uci()

        return self._ask(board, ask)

    def _ask(self, board: chess.Board, question: Callable[[chess.engine.SimpleEngine], Answer]) -> Answer | None:
        """The answer to a question about a position, tried twice, on a new process the second time; else None."""
        if not self._open:
            raise RuntimeError("the engine is not running; open it with 'with Engine(...) as engine:'")
        if not board.is_valid():
            logger.warning("no values for the illegal position %s", board.fen())
            return None
        for attempt in (1, 2):
            try:
                return question(self._process or self._start())
            except Exception as error:  # a dying engine raises anything, concurrent.futures.CancelledError included
                what = f"{type(error).__name__}: {error}"
                logger.warning("engine failed on %s (try %d): %s", board.fen(), attempt, what)
                self._kill()
        return None

    def _search(
        self, process: chess.engine.SimpleEngine, board: chess.Board, multipv: int, game: object
    ) -> list[MoveValue]:
        legal = board.legal_moves.count()
        if not legal:
            return []
        lines = process.analyse(
            board.copy(stack=False),
            self.limit,
            multipv=min(multipv, legal),
            game=game,
            info=chess.engine.INFO_BASIC | chess.engine.INFO_SCORE | chess.engine.INFO_PV,
        )
        if not all("pv" in line and "score" in line for line in lines):
            raise chess.engine.EngineError("the engine sent a line without a move or a score")
        scores = [line["score"].relative.score(mate_score=MATE_CENTIPAWNS) for line in lines]
        values = [MoveValue(line["pv"][0].uci(), score) for line, score in zip(lines, scores, strict=True)]
        return sorted(values, key=lambda value: -value.centipawns)

    def _start(self) -> chess.engine.SimpleEngine:
        try:
            process = chess.engine.SimpleEngine.popen(LastLines, self.path, timeout=max(self.timeout, 5.0))
            self._process = process
            process.configure(self._options)
            process.timeout = self.timeout  # grace behind `Limit.time`: a hung search ends after twice that
            self.name = process.id.get("name", self.path)
            return process
        except Exception as error:
            self._kill()
            raise ValueError(
                f"'{self.path}' did not start as a UCI engine ({error}); give Stockfish's path by the engine's path "
                f"setting or ${ENV_PATH}"
            ) from error

    def _kill(self) -> None:
        """End the process for certain: `quit` would wait for a hung engine, so the transport is closed instead."""
        process, self._process = self._process, None
        if process is None:
            return
        # python-chess (1.11) trips over ending a search that has timed out before, and then its thread, which is no
        # daemon, waits for ever: take the search away first.
        with contextlib.suppress(RuntimeError):  # the thread has ended by itself
            process.protocol.loop.call_soon_threadsafe(_forget_commands, process.protocol)
        with contextlib.suppress(ProcessLookupError):  # so has the process
            process.transport.kill()
        process.close()


class LastLines(chess.engine.UciProtocol):
    """Passes on an engine's last line for each move, cut to that move, once the search has ended.

    python-chess reads every line at every depth and plays it out on a board: more work than a short search itself, and
    all engines of a process share one interpreter for it. What `analyse` returns comes from the last lines alone: those
    of the last depth that all moves were searched to. A node limit ends a search anywhere, and values of unequal depth
    must not be ranked together.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[str, str] = {}  # by the number of the line, since number 1 came last
        self._depths: set[str] = set()  # of these lines
        self._even: dict[str, str] = {}  # the last ones of one depth, of as many moves as any

    def _line_received(self, line: str) -> None:
        head, mark, moves = line.partition(" pv ")
        if mark and " multipv " in head:
            number = head.partition(" multipv ")[2].partition(" ")[0]
            if number == "1":
                self._close()
            self._depths.add(head.partition(" depth ")[2].partition(" ")[0])
            self._lines[number] = head + mark + moves.split(" ", 1)[0]
            return
        if line.startswith("bestmove"):
            last = dict(self._lines)
            self._close()
            for kept in (self._even or last).values():
                super()._line_received(kept)
            self._even = {}
        super()._line_received(line)

    def _close(self) -> None:
        if len(self._depths) == 1 and len(self._lines) >= len(self._even):
            self._even = self._lines
        self._lines, self._depths = {}, set()


def _forget_commands(protocol: chess.engine.Protocol) -> None:
    protocol.command = protocol.next_command = None


class ValueCache:
    """Engine answers on disk, in one SQLite file that threads and processes can share.

    Raises:
        ValueError: the file is no cache, or cannot be read or written.
    """

    def __init__(self, path: Path | str):
        self.path, self._lock = Path(path), threading.Lock()
        with self._readable():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: each statement is a transaction of its own.
            self._db = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last answers, never the file
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (OSError, sqlite3.Error) as error:
            remedy = "delete it or give another file"
            raise ValueError(f"{self.path}: cannot be used as a cache of engine values ({error}); {remedy}") from error

    def get(self, key: str) -> list[MoveValue] | None:
        """The answer; None if it isn't there."""
        with self._readable():
            row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else [MoveValue(*each[:2]) for each in json.loads(row[0])]

    def put(self, key: str, values: Sequence[MoveValue]) -> None:
        """Keep an answer."""
        text = json.dumps(values, separators=(",", ":"))
        with self._readable():
            self._db.execute("INSERT OR REPLACE INTO answers (key, answer) VALUES (?, ?)", (key, text))

    def close(self) -> None:
        self._db.close()


class EnginePool:
    """`workers` engines that share a list of positions. Use it with `with`.

    Each search starts with a cleared hash table, so a value does not depend on which engine it came from, nor on what
    that engine had searched before.

    Args:
        workers: engine processes; each is driven by a thread that mostly waits for it.
        nodes: nodes to search for a position.
        cache: answers of earlier runs, by engine, limit, number of moves and FEN; None: no such cache.
    """

    def __init__(self, workers: int, *, nodes: int, cache: ValueCache | None = None):
        self._engines = [Engine(nodes=nodes) for _ in range(workers)]
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

    def __exit__(self, *_: object) -> None:
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
