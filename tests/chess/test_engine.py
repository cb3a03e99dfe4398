"""The engine wrapper with a real Stockfish, and with engines that hang, die, lie or aren't there; pools and caches."""

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chess
import chess.engine
import pytest

from rookworld_trl.chess.engine import Engine, EnginePool, LastLines, MoveValue, ValueCache, find_engine
from tests.support.stockfish import fake_engine, requires_stockfish


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """python-chess's threads are no daemons: one that is left keeps the program from ending."""
    yield
    deadline = time.monotonic() + 5
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("SimpleEngine")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def kept(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as answers:
        return answers.execute("SELECT COUNT(*) FROM answers").fetchone()[0]


def pid_of(engine: Engine) -> int:
    assert engine._process is not None
    return engine._process.transport.get_pid()


def is_running(pid: int) -> bool:
    """Whether the process still exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@requires_stockfish
def test_an_engines_last_lines_are_read_with_the_values_that_python_chess_reads() -> None:
    board = chess.Board("r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3")
    found = []
    for protocol in (LastLines, chess.engine.UciProtocol):
        with chess.engine.SimpleEngine.popen(protocol, find_engine()) as engine:
            engine.configure({"Threads": 1, "Hash": 16})
            found.append(engine.analyse(board, chess.engine.Limit(depth=9), multipv=5))
    cut, whole = ([(line["pv"][:1], line["score"]) for line in lines] for lines in found)
    assert cut == whole
    assert {len(line["pv"]) for line in found[0]} == {1}
    assert max(len(line["pv"]) for line in found[1]) > 1


def test_values_of_unequal_depth_are_not_ranked_together(tmp_path: Path) -> None:
    """The search ends while depth 3 is under way: e2e4 is better at depth 3 than d2d4 at 2, but not at equal depth."""
    lines = [(2, 1, 30, "d2d4"), (2, 2, 20, "e2e4"), (3, 1, 40, "e2e4"), (2, 2, 30, "d2d4")]
    prints = "; ".join(
        f"print('info depth {depth} multipv {number} score cp {cp} nodes 10 pv {move} a7a6', flush=True)"
        for depth, number, cp, move in lines
    )
    with Engine(fake_engine(tmp_path / "fake", f"{prints}; print('bestmove e2e4', flush=True)"), nodes=10) as engine:
        assert engine.analyse(chess.Board(), multipv=2) == [MoveValue("d2d4", 30), MoveValue("e2e4", 20)]


def test_an_engine_that_plays_is_told_the_game(tmp_path: Path) -> None:
    """Its answer hangs on what it was sent: on the second time that the knights come home it plays another move."""
    twice = "moves g1f3 g8f6 f3g1 f6g8 g1f3 g8f6 f3g1 f6g8"
    answer = f"print('bestmove', 'e2e4' if position.endswith({twice!r}) else 'g1f3', flush=True)"
    board = chess.Board()
    with Engine(fake_engine(tmp_path / "fake", answer), nodes=10) as engine:
        assert engine.play(board) == "g1f3"
        for move in twice.split()[1:]:
            board.push_uci(move)
        assert engine.play(board) == "e2e4"


@requires_stockfish
def test_mates_by_hand() -> None:
    with Engine(nodes=20_000) as engine:
        mirrored = engine.analyse(chess.Board("7k/8/5KQ1/8/8/8/8/8 w - - 0 1").mirror(), multipv=1)
        losing = engine.analyse(chess.Board("7k/8/6K1/8/8/8/8/R7 b - - 0 1"), multipv=1)
    assert mirrored is not None
    assert mirrored[0].centipawns == 9999  # Black mates: the mover's view
    assert losing == [MoveValue("h8g8", -9999)]


@requires_stockfish
@pytest.mark.parametrize(
    "fen",
    [
        "8/8/8/8/8/8/8/4K3 w - - 0 1",  # no black king: Stockfish crashes on it
        "4k3/4R3/8/8/8/8/8/4K3 w - - 0 1",  # the side that isn't to move is in check
    ],
)
def test_illegal_positions_never_reach_the_engine(fen: str) -> None:
    with Engine(nodes=500) as engine:
        before = pid_of(engine)
        assert engine.analyse(chess.Board(fen)) is None
        assert pid_of(engine) == before
        assert engine.analyse(chess.Board(), multipv=1)


@requires_stockfish
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_hung_or_killed_engine_is_replaced(fault: signal.Signals) -> None:
    with Engine(nodes=500, timeout=0.5) as engine:
        for _ in (1, 2):
            hurt = pid_of(engine)
            os.kill(hurt, fault)
            started = time.monotonic()
            values = engine.analyse(chess.Board(), multipv=3)
            assert time.monotonic() - started < 15
            assert values is not None
            assert len(values) == 3
            assert pid_of(engine) != hurt
            assert wait_until_gone(hurt)


@pytest.mark.parametrize(
    "on_go",
    [
        "os._exit(1)",
        "print('bestmove a1a8', flush=True)",  # illegal
        "print('info depth 1 score cp 5\\nbestmove e2e4', flush=True)",  # a score for no move
        "print('nonsense\\ninfo depth x score cp y pv zz\\nbestmove none', flush=True)",
    ],
)
def test_an_engine_that_always_fails_costs_a_none(tmp_path: Path, on_go: str) -> None:
    with Engine(fake_engine(tmp_path / "fake", on_go), nodes=10, timeout=0.5) as engine:
        assert engine.analyse(chess.Board(), multipv=1) is None
        assert engine.analyse(chess.Board(), multipv=1) is None, "the next position is tried as well"


def test_a_missing_engine_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (str(tmp_path / "nowhere"), "no-such-engine"):
        with pytest.raises(FileNotFoundError, match="apt-get install stockfish") as caught:
            Engine(missing, nodes=10)
        assert missing in str(caught.value)
    not_executable = tmp_path / "stockfish"
    not_executable.write_text("")
    with pytest.raises(FileNotFoundError, match="cannot be executed"):
        Engine(str(not_executable), nodes=10)
    monkeypatch.setenv("STOCKFISH_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        find_engine()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    with pytest.raises(ValueError, match=r"'.*script' did not start as a UCI engine .*STOCKFISH_PATH"):
        Engine(str(script), nodes=10).__enter__()
    engine = Engine(fake_engine(tmp_path / "fake", "pass"), nodes=10)
    with pytest.raises(RuntimeError, match="with Engine"):
        engine.analyse(chess.Board())
    with engine:
        assert pid_of(engine)  # it is still there


@requires_stockfish
@pytest.mark.parametrize("stopped", [False, True])
def test_leaving_ends_the_process(stopped: bool) -> None:
    with Engine(nodes=10) as engine:
        pid = pid_of(engine)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
    assert wait_until_gone(pid)


# Several engines, and answers that outlive the run -------------------------------------------------------------------

FENS = [
    chess.STARTING_FEN,
    "6k1/5ppp/8/8/8/8/8/4R1K1 w - - 0 1",  # mate in one
    "r1bqkbnr/pppp1ppp/2n5/4p3/2B1P3/5Q2/PPPP1PPP/RNB1K1NR w KQkq - 4 4",  # Scholar's mate
    "8/8/4k3/8/8/4K3/4P3/8 w - - 0 1",
    "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1",  # stalemate: no moves
]
VALUES = [MoveValue("e2e4", 31), MoveValue("e1e8", 9999)]


@requires_stockfish
def test_a_pool_gives_what_one_engine_gives_in_order() -> None:
    with Engine(nodes=300) as engine:
        expected = [engine.analyse(chess.Board(fen), multipv=500, game=fen) for fen in FENS]
    with EnginePool(2, nodes=300) as pool:
        assert list(pool.values(FENS * 3)) == expected * 3
    assert expected[1] is not None
    assert expected[1][0] == MoveValue("e1e8", 9999)
    assert expected[4] == []


@requires_stockfish
def test_the_cache_answers_in_the_engines_place_and_only_for_the_same_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ValueCache(tmp_path / "values.sqlite")
    with monkeypatch.context() as patch, EnginePool(2, nodes=300, cache=cache) as pool:
        first = list(pool.values(FENS))
        assert kept(cache.path) == len(FENS)
        patch.setattr(Engine, "analyse", lambda *_, **__: pytest.fail("asked the engine again"))
        assert list(pool.values(FENS)) == first
        with pytest.raises(pytest.fail.Exception):
            list(pool.values(FENS, multipv=1))
    with EnginePool(1, nodes=400, cache=cache) as pool:  # another limit
        list(pool.values(FENS[:1]))
    assert kept(cache.path) == len(FENS) + 1


def test_the_cache_survives_and_is_shared_by_threads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "values.sqlite"
    cache = ValueCache(path)

    def fill(start: int) -> None:
        for i in range(start, start + 25):
            cache.put(str(i), VALUES)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(fill, (0, 25)))
    cache.close()
    again = ValueCache(path)
    assert kept(path) == 50
    assert again.get("49") == VALUES
    assert again.get("50") is None
    again.put("empty", [])
    assert again.get("empty") == []


def test_a_file_that_is_no_cache_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, just a text that is long enough to be read as a broken header" * 10)
    with pytest.raises(ValueError, match=r"notes.txt: cannot be used as a cache"):
        ValueCache(path)
    assert path.read_text().startswith("not a database")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used as a cache"):
        ValueCache(tmp_path / "file" / "values.sqlite")
