"""The engine wrapper with a real Stockfish, and with engines that hang, die, lie or aren't there; pools and caches."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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


def pid_of(engine: Engine) -> int:
    assert engine.pid is not None
    return engine.pid


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
def test_an_engines_last_lines_are_read_to_the_reply_with_the_values_that_python_chess_reads() -> None:
    board = chess.Board("r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3")
    found = []
    for protocol in (LastLines, chess.engine.UciProtocol):
        with chess.engine.SimpleEngine.popen(protocol, find_engine()) as engine:
            engine.configure({"Threads": 1, "Hash": 16})
            found.append(engine.analyse(board, chess.engine.Limit(depth=9), multipv=5))
    cut, whole = ([(line["pv"][:2], line["score"]) for line in lines] for lines in found)
    assert cut == whole
    assert {len(line["pv"]) for line in found[0]} == {2}
    assert max(len(line["pv"]) for line in found[1]) > 2
    with Engine(nodes=1) as values:
        values.limit = chess.engine.Limit(depth=9)
        replies = [(value.move, value.reply) for value in values.analyse(board, multipv=5) or []]
    assert replies == [(line["pv"][0].uci(), line["pv"][1].uci()) for line in found[1]]


def test_values_of_unequal_depth_are_not_ranked_together(tmp_path: Path) -> None:
    """The search ends while depth 3 is under way: e2e4 is better at depth 3 than d2d4 at 2, but not at equal depth."""
    lines = [(2, 1, 30, "d2d4"), (2, 2, 20, "e2e4"), (3, 1, 40, "e2e4"), (2, 2, 30, "d2d4")]
    prints = "; ".join(
        f"print('info depth {depth} multipv {number} score cp {cp} nodes 10 pv {move} a7a6', flush=True)"
        for depth, number, cp, move in lines
    )
    with Engine(fake_engine(tmp_path / "fake", f"{prints}; print('bestmove e2e4', flush=True)"), nodes=10) as engine:
        assert engine.analyse(chess.Board(), multipv=2) == [MoveValue("d2d4", 30, None), MoveValue("e2e4", 20, None)]


@requires_stockfish
def test_values_of_every_move_best_first() -> None:
    board = chess.Board("8/4P1k1/8/8/8/8/8/4K3 w - - 0 1")
    with Engine(nodes=20_000) as engine:
        values = engine.analyse(board, multipv=500)
    assert values is not None
    assert {value.move for value in values} == {move.uci() for move in board.legal_moves}
    assert [value.centipawns for value in values] == sorted((value.centipawns for value in values), reverse=True)
    assert values[0].move in ("e7e8q", "e7e8r")


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
@pytest.mark.parametrize("nodes", [1, 100])
def test_stockfish_does_not_repeat_in_a_won_game(nodes: int) -> None:
    """What it plays without the game's moves would give the position for the third time: with them, another."""
    with Engine(nodes=nodes) as engine:
        start = chess.Board("6k1/8/8/8/8/8/5PPP/Q5K1 w - - 7 8")
        best = engine.play(start)
        assert best is not None
        start.push_uci(best)
        board = chess.Board(start.fen())  # the game begins here
        reply = next(move.uci() for move in board.legal_moves)
        there, back = (f"{move[2:]}{move[:2]}" for move in (best, reply))
        for move in (reply, there, back, best, reply, there, back):
            board.push_uci(move)
        assert not board.is_repetition(3)
        assert engine.play(board.copy(stack=False)) == best
        move = engine.play(board)
        assert move is not None
        board.push_uci(move)
        assert not board.is_repetition(3)


@requires_stockfish
def test_mates_by_hand() -> None:
    with Engine(nodes=20_000) as engine:
        mating = engine.analyse(chess.Board("7k/8/5KQ1/8/8/8/8/8 w - - 0 1"), multipv=1)
        mirrored = engine.analyse(chess.Board("7k/8/5KQ1/8/8/8/8/8 w - - 0 1").mirror(), multipv=1)
        losing = engine.analyse(chess.Board("7k/8/6K1/8/8/8/8/R7 b - - 0 1"), multipv=1)
    assert mating is not None
    assert (mating[0].centipawns, mating[0].mate) == (9999, 1)
    assert mirrored is not None
    assert (mirrored[0].centipawns, mirrored[0].mate) == (9999, 1)  # Black mates: the mover's view again
    assert losing == [MoveValue("h8g8", -9999, -1)]


@requires_stockfish
@pytest.mark.parametrize(
    "fen",
    [
        "8/8/8/8/8/8/8/4K3 w - - 0 1",  # no black king: Stockfish crashes on it
        "4k3/8/8/8/8/8/8/K3K3 w - - 0 1",
        "P3k3/8/8/8/8/8/8/4K3 w - - 0 1",
        "4k3/4R3/8/8/8/8/8/4K3 w - - 0 1",  # the side that isn't to move is in check
        "4k3/8/8/8/8/QQQQQQQQ/QQQQQQQQ/QQQQKQQQ b - - 0 1",
        "8/8/8/8/8/8/8/8 w - - 0 1",
    ],
)
def test_illegal_positions_never_reach_the_engine(fen: str) -> None:
    with Engine(nodes=500) as engine:
        before = pid_of(engine)
        assert engine.analyse(chess.Board(fen)) is None
        assert pid_of(engine) == before
        assert engine.restarts == 0
        assert engine.analyse(chess.Board(), multipv=1)


@requires_stockfish
def test_a_hung_engine_is_replaced() -> None:
    with Engine(nodes=500, timeout=0.5) as engine:
        hung = pid_of(engine)
        os.kill(hung, signal.SIGSTOP)
        started = time.monotonic()
        values = engine.analyse(chess.Board(), multipv=3)
        assert time.monotonic() - started < 15
        assert values is not None
        assert len(values) == 3
        assert engine.restarts == 1
        assert pid_of(engine) != hung
        assert wait_until_gone(hung)


@requires_stockfish
def test_a_killed_engine_is_replaced() -> None:
    with Engine(nodes=500) as engine:
        for restarts in (1, 2):
            killed = pid_of(engine)
            os.kill(killed, signal.SIGKILL)
            assert wait_until_gone(killed)
            board = chess.Board()
            board.push(list(board.legal_moves)[restarts])
            assert engine.analyse(board, multipv=1)
            assert engine.restarts == restarts


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
        assert engine.restarts == 2  # ready for the next position
        assert pid_of(engine)


@pytest.mark.parametrize(
    "on_go", ["time.sleep(600)", "[print('info depth 1 string nonsense', flush=True) for _ in iter(int, 1)]"]
)
def test_an_engine_that_never_ends_a_search_costs_a_none_in_time(tmp_path: Path, on_go: str) -> None:
    with Engine(fake_engine(tmp_path / "fake", on_go), nodes=10, timeout=0.2) as engine:
        started, hung = time.monotonic(), pid_of(engine)
        assert engine.analyse(chess.Board(), multipv=1) is None
        assert time.monotonic() - started < 20
        assert wait_until_gone(hung)


def test_a_restart_that_fails_is_tried_again(tmp_path: Path) -> None:
    """The file is away for a while: those positions have no values, the next one has."""
    answer = "print('info depth 1 score cp 5 pv e2e4\\nbestmove e2e4', flush=True)"
    path = tmp_path / "fake"
    with Engine(fake_engine(path, answer), nodes=10, timeout=2.0) as engine:
        assert engine.analyse(chess.Board(), multipv=1) == [MoveValue("e2e4", 5, None)]
        path.rename(tmp_path / "away")
        os.kill(pid_of(engine), signal.SIGKILL)
        assert engine.analyse(chess.Board(), multipv=1) is None
        assert engine.analyse(chess.Board(), multipv=1) is None
        (tmp_path / "away").rename(path)
        assert engine.analyse(chess.Board(), multipv=1) == [MoveValue("e2e4", 5, None)]
    with pytest.raises(RuntimeError, match="with Engine"):
        engine.analyse(chess.Board())


def children() -> dict[int, str]:
    """State of each child of this process: Z is a zombie."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == os.getpid():
                found[int(entry.name)] = state
    return found


def test_no_zombies(tmp_path: Path) -> None:
    before = children()
    for on_go in ("os._exit(1)", "time.sleep(600)", "os.kill(os.getpid(), 19)"):  # crashes, hangs, is stopped
        with Engine(fake_engine(tmp_path / "fake", on_go), nodes=10, timeout=0.2) as engine:
            assert engine.analyse(chess.Board(), multipv=1) is None
    deadline = time.monotonic() + 5
    while left := children().keys() - before.keys():
        assert time.monotonic() < deadline, {pid: children().get(pid) for pid in left}
        time.sleep(0.05)


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
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Engine(sys.executable, nodes=10, timeout=0)
    with pytest.raises(ValueError, match="at least one engine"):
        EnginePool(0, nodes=100)
    engine = Engine(fake_engine(tmp_path / "fake", "pass"), nodes=10)
    with pytest.raises(RuntimeError, match="with Engine"):
        engine.analyse(chess.Board())
    with engine:
        with pytest.raises(RuntimeError, match="running already"), engine:
            pass
        assert pid_of(engine)  # it is still there


def test_something_else_than_an_engine_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    with pytest.raises(ValueError, match=r"'.*script' did not start as a UCI engine .*STOCKFISH_PATH"):
        Engine(str(script), nodes=10).__enter__()


@requires_stockfish
@pytest.mark.parametrize("stopped", [False, True])
def test_leaving_ends_the_process(stopped: bool) -> None:
    with Engine(nodes=10) as engine:
        pid = pid_of(engine)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
    assert wait_until_gone(pid)


PROGRAM = """
import os, signal, sys, chess
from rookworld_trl.chess.engine import Engine
with Engine(nodes=10) as engine:
    engine.analyse(chess.Board(), multipv=1)
    print(engine.pid, flush=True)
    if sys.argv[1] == "stopped":
        os.kill(engine.pid, signal.SIGSTOP)
    if sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("on purpose")
"""


@requires_stockfish
@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("exit", 3), ("stopped", 1), ("killed", -9)])
def test_a_failing_program_ends_and_takes_the_engine_along(how: str, code: int) -> None:
    """python-chess's engine thread isn't a daemon: a wrapper that forgets to close would hang here."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == code, run.stderr
    assert wait_until_gone(int(run.stdout))


@requires_stockfish
def test_the_move_played_follows_from_the_position_alone() -> None:
    """Whatever was searched before; a full hash table from earlier positions gives other moves at 100 nodes."""
    rng, boards = random.Random(0), [chess.Board()]
    for _ in range(40):
        boards.append(boards[-1].copy())
        boards[-1].push(rng.choice(list(boards[-1].legal_moves)))
    with Engine(nodes=100) as engine:
        moves = [engine.play(board) for board in boards]
        assert [engine.play(board) for board in boards[::-1]] == moves[::-1]
    assert all(chess.Move.from_uci(move or "") in board.legal_moves for board, move in zip(boards, moves, strict=True))


# Several engines, and answers that outlive the run -------------------------------------------------------------------

FENS = [
    chess.STARTING_FEN,
    "6k1/5ppp/8/8/8/8/8/4R1K1 w - - 0 1",  # mate in one
    "r1bqkbnr/pppp1ppp/2n5/4p3/2B1P3/5Q2/PPPP1PPP/RNB1K1NR w KQkq - 4 4",  # Scholar's mate
    "8/8/4k3/8/8/4K3/4P3/8 w - - 0 1",
    "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1",  # stalemate: no moves
]
VALUES = [MoveValue("e2e4", 31, None), MoveValue("e1e8", 9999, 1)]


@requires_stockfish
def test_a_pool_gives_what_one_engine_gives_in_order() -> None:
    with Engine(nodes=300) as engine:
        expected = [engine.analyse(chess.Board(fen), multipv=500, game=fen) for fen in FENS]
    with EnginePool(2, nodes=300) as pool:
        assert list(pool.values(FENS * 3)) == expected * 3
    assert expected[1] is not None
    assert expected[1][0] == MoveValue("e1e8", 9999, 1)
    assert expected[4] == []


@requires_stockfish
def test_the_cache_answers_in_the_engines_place_and_only_for_the_same_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ValueCache(tmp_path / "values.sqlite")
    with monkeypatch.context() as patch, EnginePool(2, nodes=300, cache=cache) as pool:
        first = list(pool.values(FENS))
        assert len(cache) == len(FENS)
        patch.setattr(Engine, "analyse", lambda *_, **__: pytest.fail("asked the engine again"))
        assert list(pool.values(FENS)) == first
        with pytest.raises(pytest.fail.Exception):
            list(pool.values(FENS, multipv=1))
    with EnginePool(1, nodes=400, cache=cache) as pool:  # another limit
        list(pool.values(FENS[:1]))
    assert len(cache) == len(FENS) + 1


@requires_stockfish
def test_an_illegal_position_costs_a_none_and_is_not_kept(tmp_path: Path) -> None:
    cache = ValueCache(tmp_path / "values.sqlite")
    with EnginePool(1, nodes=100, cache=cache) as pool:
        answers = list(pool.values(["8/8/8/8/8/8/8/4K3 w - - 0 1", FENS[3]]))
    assert answers[0] is None
    assert answers[1]
    assert len(cache) == 1


def test_the_cache_survives_and_is_shared_by_threads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "values.sqlite"
    cache = ValueCache(path)

    def fill(start: int) -> None:
        for i in range(start, start + 25):
            cache.put(str(i), VALUES)

    threads = [threading.Thread(target=fill, args=(start,)) for start in (0, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    again = ValueCache(path)
    assert len(again) == 50
    assert again.get("49") == VALUES
    assert again.get("50") is None
    again.put("empty", [])
    assert again.get("empty") == []


def test_the_oldest_answers_go_first(tmp_path: Path) -> None:
    cache = ValueCache(tmp_path / "values.sqlite", size=20)
    for i in range(20):
        cache.put(str(i), VALUES)
    cache.put("20", VALUES)
    assert len(cache) == 18  # one too many, and a tenth of 20 more
    assert [key for key in map(str, range(21)) if cache.get(key) is None] == ["0", "1", "2"]


def test_a_file_that_is_no_cache_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, just a text that is long enough to be read as a broken header" * 10)
    with pytest.raises(ValueError, match=r"notes.txt: cannot be used as a cache"):
        ValueCache(path)
    assert path.read_text().startswith("not a database")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used as a cache"):
        ValueCache(tmp_path / "file" / "values.sqlite")
    with pytest.raises(ValueError, match="keep at least one"):
        ValueCache(tmp_path / "values.sqlite", size=0)


DAMAGED = ["", "{", "7", "null", "[7]", '[["e2e4"]]', '[["e2e4", "31", null]]', '[["e2e4", 31, null, 5]]', b"[[\xff]]"]


@pytest.mark.parametrize("answer", DAMAGED)
def test_a_damaged_answer_is_a_miss_and_is_replaced(tmp_path: Path, answer: object) -> None:
    path = tmp_path / "values.sqlite"
    cache = ValueCache(path)
    cache.put("a", VALUES)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET answer = ?", (answer,))
    assert cache.get("a") is None
    cache.put("a", VALUES)
    assert cache.get("a") == VALUES


def test_damaged_pages_are_misses_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "values.sqlite"
    cache = ValueCache(path, size=100)
    for i in range(2000):
        cache.put(str(i), VALUES)
    cache.close()
    whole = path.read_bytes()
    pages = range(4096, len(whole), 4096)  # all but the first, which says that this is a database
    assert len(pages) > 2
    for page in pages:
        path.write_bytes(whole[:page] + b"\x5a" * 4096 + whole[page + 4096 :])
        damaged = ValueCache(path, size=100)
        caplog.clear()
        for i in range(1900, 2000):
            assert damaged.get(str(i)) in (None, VALUES)
            damaged.put(str(i), VALUES)
        said = [each for each in caplog.messages if f"{path}: damaged" in each]
        assert len(said) <= 1
        damaged.close()
    path.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    damaged = ValueCache(path)
    assert damaged.get("1999") is None
    damaged.put("1999", VALUES)
    assert f"{path}: damaged" in caplog.text
