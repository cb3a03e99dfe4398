"""The UCI engine: the protocol line by line, fallbacks, and whole games driven by python-chess."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chess
import chess.engine
import pytest

from rookworld_trl.chess import play as players_module
from rookworld_trl.chess.play import ModelPlayer, RandomPlayer
from rookworld_trl.chess.policy import PolicyOutput
from rookworld_trl.chess.uci import UciEngine, read_position

START = chess.Board()


class Scripted(ModelPlayer):
    """A model's player whose answers come from a list; remembers what it was asked with."""

    answers_left: list[PolicyOutput | None]
    asked: list[tuple[float, int]]

    def _answers(self, boards: Sequence[chess.Board]) -> list[PolicyOutput | None]:
        type(self).asked.append((self._temperature, len(boards)))
        return [type(self).answers_left.pop(0) for _ in boards]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> tuple[UciEngine, list[str], list[PolicyOutput | None]]:
    Scripted.answers_left, Scripted.asked = [], []
    monkeypatch.setattr(players_module, "ModelPlayer", Scripted)
    lines: list[str] = []
    return UciEngine(lambda: ("nano", None), lines.append), lines, Scripted.answers_left


def said(engine: UciEngine, lines: list[str], *commands: str) -> list[str]:
    lines.clear()
    for command in commands:
        assert engine.answer(command)
    return list(lines)


GOOD = PolicyOutput(("e2e4", "d2d4", "g1f3"), (0.3, 0.5, -0.2), "e2e4")


def test_the_models_own_move_and_its_eval(engine: Any) -> None:
    engine, lines, answers = engine
    answers.append(GOOD)
    assert said(engine, lines, "position startpos", "go movetime 100") == [
        "info depth 1 seldepth 1 score cp 30 nodes 1 pv e2e4",
        "bestmove e2e4",
    ]
    assert Scripted.asked == [(0.0, 1)]


@pytest.mark.parametrize(
    ("answer", "move"),
    [
        (PolicyOutput(("e2e4", "d2d4"), (0.3,), "d2d4"), "d2d4"),  # listed, but no eval is left for it
        (PolicyOutput(("e2e4",), (0.3,), "g1f3"), "g1f3"),  # not listed
        (None, None),  # no answer of the format: a random move
    ],
)
def test_a_move_without_an_eval_has_no_score(engine: Any, answer: PolicyOutput | None, move: str | None) -> None:
    engine, lines, answers = engine
    answers.append(answer)
    spoken = said(engine, lines, "position startpos", "go")
    played = spoken[-1].removeprefix("bestmove ")
    assert chess.Move.from_uci(played) in START.legal_moves
    assert move in (None, played)
    assert spoken[0] == f"info depth 1 seldepth 1 nodes 1 pv {played}"
    assert spoken[1:-1] == ([] if answer else ["info string fallback random: the model wrote no answer of the format"])


def test_an_illegal_move_is_never_played(engine: Any) -> None:
    """Its highest legal candidate is, and what the model wrote is told."""
    engine, lines, answers = engine
    answers.append(PolicyOutput(("d2d4", "e2e5", "g1f3"), (0.1, 3.0, 0.2), "e2e5"))
    spoken = said(engine, lines, "position startpos", "go")
    assert spoken[1:] == ["info string fallback candidates: the model wrote B: e2e5", "bestmove g1f3"]


def test_an_infinite_search_keeps_its_move_until_stop(engine: Any) -> None:
    engine, lines, answers = engine
    answers.append(GOOD)
    assert not any(line.startswith("bestmove") for line in said(engine, lines, "position startpos", "go infinite"))
    assert said(engine, lines, "stop") == ["bestmove e2e4"]
    assert said(engine, lines, "stop") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("setoption name Contempt value 3", "no option 'Contempt'"),
        ("setoption name Temperature value 201", "201 is not between 0 and 200; it stays 0"),
        ("setoption name temperature value warm", "Temperature: warm is not between"),
        ("position fen 8/8/8/8/8/8/8/8 w - - 0 1", "is not legal"),
        ("position fen rubbish", "error"),
        ("position startpos moves e2e4 e2e4", "illegal uci: 'e2e4'"),
        ("position", "write 'startpos' or 'fen'"),
    ],
)
def test_an_impossible_line_is_told_and_changes_nothing(engine: Any, line: str, message: str) -> None:
    engine, lines, answers = engine
    spoken = said(engine, lines, line)
    assert len(spoken) == 1
    assert spoken[0].startswith("info string error: ")
    assert message in spoken[0]
    answers.append(GOOD)
    assert said(engine, lines, "go")[-1] == "bestmove e2e4"


def test_unknown_words_are_ignored_and_quit_ends(engine: Any) -> None:
    engine, lines, answers = engine
    answers.append(GOOD)
    engine.run(["hello", "joho go", "quit", "go"])
    assert lines[-1] == "bestmove e2e4"


def test_a_finished_game_has_no_move(engine: Any) -> None:
    engine, lines, _ = engine
    spoken = said(engine, lines, "position fen 7k/6Q1/5K2/8/8/8/8/8 b - - 0 1", "go")
    assert spoken == ["info depth 0 score mate 0", "bestmove (none)"]


def test_positions_with_moves() -> None:
    board = read_position(["fen", "8/P7/8/8/8/8/k7/2K5", "w", "-", "-", "0", "1", "moves", "a7a8q", "a2b3"])
    assert board.fen() == "Q7/8/8/8/8/1k6/8/2K5 w - - 1 2"


@pytest.fixture(scope="module")
def running() -> Iterator[chess.engine.SimpleEngine]:
    """The engine as a chess program starts it, with the model that comes with the package."""
    root = Path(__file__).parents[1]
    with chess.engine.SimpleEngine.popen_uci(
        [sys.executable, "-m", "rookworld_trl.chess.uci"], timeout=60, stderr=subprocess.DEVNULL, cwd=root
    ) as engine:
        yield engine


def test_python_chess_plays_whole_games_with_it(running: chess.engine.SimpleEngine) -> None:
    """python-chess refuses an illegal move with an `EngineError`; random opponents lead it to odd positions."""
    opponent = RandomPlayer(seed=3)
    running.configure({"Temperature": 50})
    for game in range(4):
        board = chess.Board()
        while not board.is_game_over(claim_draw=True) and board.ply() < 120:
            if board.turn == (game % 2 == 0):
                move = running.play(board, chess.engine.Limit(time=0.1), game=game).move
                assert move in board.legal_moves
            else:
                move = chess.Move.from_uci(opponent.choose([board])[0].move or "")
            board.push(move)
        assert board.ply() > 4


def test_python_chess_reads_its_line(running: chess.engine.SimpleEngine) -> None:
    line = running.analyse(chess.Board(), chess.engine.Limit(depth=1))
    assert line["pv"][0] in chess.Board().legal_moves
    assert "score" in line
