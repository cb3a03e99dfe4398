"""Several engines give what one gives, in order; their cache is bounded, shared and survives."""

import sqlite3
import threading
from pathlib import Path

import chess
import pytest

from rookworld_trl.chess.engine import Engine, MoveValue
from rookworld_trl.chess.engine_pool import EnginePool, ValueCache
from tests.support.stockfish import requires_stockfish

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
    with Engine(nodes=300, cache_size=0) as engine:
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


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = ValueCache(tmp_path / "values.sqlite", size=20)
    for i in range(20):
        cache.put(str(i), VALUES)
    assert cache.get("0") is not None  # used: the oldest is now "1"
    cache.put("20", VALUES)
    assert len(cache) == 18  # one too many, and a tenth of 20 more
    assert [key for key in map(str, range(21)) if cache.get(key) is None] == ["1", "2", "3"]


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


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least one engine"):
        EnginePool(0, nodes=100)
