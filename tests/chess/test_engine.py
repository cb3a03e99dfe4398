"""The engine wrapper with a real Stockfish, and with engines that hang, die, lie or aren't there."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import chess
import chess.engine
import pytest

from rookworld_trl.chess.engine import Engine, LastLines, MoveValue, find_engine
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


@requires_stockfish
def test_values_are_the_movers() -> None:
    """A queen up: good for the side that has it, bad for the other, whatever the colour."""
    with Engine(nodes=2000) as engine:
        for fen in ("4k3/8/8/8/8/8/8/Q3K3 w - - 0 1", "q3k3/8/8/8/8/8/8/4K3 b - - 0 1"):
            board = chess.Board(fen)
            values = engine.analyse(board, multipv=1)
            assert values is not None
            assert values[0].centipawns > 300
            board.turn = not board.turn
            if board.is_valid():
                values = engine.analyse(board, multipv=1)
                assert values is not None
                assert values[0].centipawns < -300


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
def test_equal_work_gives_equal_values() -> None:
    board = chess.Board("r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3")
    runs = []
    for _ in range(2):
        with Engine(nodes=3000) as engine:
            runs.append(engine.analyse(board, multipv=5))
    assert runs[0] == runs[1]
    assert runs[0] is not None
    assert len(runs[0]) == 5


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
@pytest.mark.parametrize("fen", ["7k/5Q2/5K2/8/8/8/8/8 b - - 1 1", "7k/6Q1/5K2/8/8/8/8/8 b - - 1 1"])
def test_a_finished_game_has_no_moves(fen: str) -> None:
    with Engine(nodes=500) as engine:
        assert engine.analyse(chess.Board(fen)) == []


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
    with Engine(fake_engine(path, answer), nodes=10, timeout=2.0, cache_size=0) as engine:
        assert engine.analyse(chess.Board(), multipv=1) == [MoveValue("e2e4", 5, None)]
        path.rename(tmp_path / "away")
        os.kill(pid_of(engine), signal.SIGKILL)
        assert engine.analyse(chess.Board(), multipv=1) is None
        assert engine.analyse(chess.Board(), multipv=1) is None
        (tmp_path / "away").rename(path)
        assert engine.analyse(chess.Board(), multipv=1) == [MoveValue("e2e4", 5, None)]
    with pytest.raises(RuntimeError, match="with Engine"):
        engine.analyse(chess.Board())


def test_an_open_engine_is_not_opened_again(tmp_path: Path) -> None:
    with Engine(fake_engine(tmp_path / "fake", "pass"), nodes=10) as engine:
        with pytest.raises(RuntimeError, match="running already"), engine:
            pass
        assert pid_of(engine)  # it is still there


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


@requires_stockfish
def test_the_cache_is_used_and_bounded() -> None:
    boards = []
    for move in list(chess.Board().legal_moves)[:4]:
        board = chess.Board()
        board.push(move)
        boards.append(board)
    with Engine(nodes=500, cache_size=2) as engine:
        first = [engine.analyse(board, multipv=1) for board in boards]
        os.kill(pid_of(engine), signal.SIGKILL)
        assert [engine.analyse(board, multipv=1) for board in boards[2:]] == first[2:]  # from the cache
        assert engine.restarts == 0
        assert engine.analyse(boards[2], multipv=2) != first[2]  # another number of moves is another question
        assert engine.restarts == 1
        os.kill(pid_of(engine), signal.SIGKILL)
        assert engine.analyse(boards[0], multipv=1) == first[0]
        assert engine.restarts == 2, "only so many are kept"
    with Engine(nodes=500, cache_size=0) as engine:
        engine.analyse(boards[0], multipv=1)
        os.kill(pid_of(engine), signal.SIGKILL)
        engine.analyse(boards[0], multipv=1)
        assert engine.restarts == 1


@requires_stockfish
def test_a_caller_cannot_spoil_the_cache() -> None:
    with Engine(nodes=500) as engine:
        values = engine.analyse(chess.Board(), multipv=3)
        assert values is not None
        expected = list(values)
        values.clear()
        assert engine.analyse(chess.Board(), multipv=3) == expected


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


def test_something_else_than_an_engine_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    with pytest.raises(ValueError, match=r"'.*script' did not start as a UCI engine .*STOCKFISH_PATH"):
        Engine(str(script), nodes=10).__enter__()


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Engine(sys.executable, nodes=10, timeout=0)


@requires_stockfish
def test_an_engine_is_used_inside_with() -> None:
    engine = Engine(nodes=10)
    with pytest.raises(RuntimeError, match="with Engine"):
        engine.analyse(chess.Board())
    with engine:
        assert engine.analyse(chess.Board(), multipv=1)
    with pytest.raises(RuntimeError, match="with Engine"):
        engine.analyse(chess.Board())


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
