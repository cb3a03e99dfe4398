"""Games between scripted, random, engine and model players: every way a game can end, and batches of them."""

import io
from collections.abc import Sequence
from typing import Any

import chess
import chess.pgn
import pytest

from rookworld_trl.chess import ParseError
from rookworld_trl.chess.play import (
    Choice,
    EnginePlayer,
    GameRecord,
    GreedyCapturePlayer,
    ModelPlayer,
    Player,
    RandomPlayer,
    play_games,
)
from rookworld_trl.chess.policy import PolicyOutput

START = chess.STARTING_FEN


class Scripted:
    """Plays a list of moves, counting how often and for how many boards it is asked."""

    name = "scripted"

    def __init__(self, *moves: str | None):
        self.moves, self.asked = list(moves), []

    def choose(self, boards: Sequence[chess.Board]) -> list[Choice]:
        self.asked.append(len(boards))
        return [Choice(self.moves.pop(0)) for _ in boards]


def play_game(white: Player, black: Player, fen: str = START, max_plies: int = 400) -> GameRecord:
    return play_games([(white, black, fen)], max_plies)[0]


@pytest.mark.parametrize(
    ("fen", "white", "black", "result", "reason"),
    [
        (START, ["f2f3", "g2g4"], ["e7e5", "d8h4"], "0-1", "checkmate"),
        ("7k/8/5KQ1/8/8/8/8/8 w - - 0 1", ["g6g7"], [], "1-0", "checkmate"),
        ("7k/8/5KQ1/8/8/8/8/8 w - - 0 1", ["g6f7"], [], "1/2-1/2", "stalemate"),
        ("8/8/8/3k4/8/8/3p4/3K4 w - - 0 1", ["d1d2"], [], "1/2-1/2", "insufficient material"),
        ("8/8/4k3/8/8/4K3/8/R7 w - - 99 120", ["a1a2"], [], "1/2-1/2", "50 moves"),
        ("8/8/4k3/8/8/4K3/8/R7 w - - 149 120", [], [], "1/2-1/2", "50 moves"),
        ("7k/8/5KQ1/8/8/8/8/8 w - - 99 120", ["g6g7"], [], "1-0", "checkmate"),  # mate goes first
        (START, ["g1f3", "f3g1"] * 2, ["g8f6", "f6g8"] * 2, "1/2-1/2", "threefold repetition"),
        (START, ["e2e5"], [], "0-1", "illegal move"),
        (START, ["e2e4"], [""], "1-0", "illegal move"),
        (START, ["e2e4"], ["nonsense"], "1-0", "illegal move"),
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", ["e1h1"], [], "0-1", "illegal move"),
        (START, ["e2e4"], [None], "*", "no answer"),
        ("7k/6Q1/5K2/8/8/8/8/8 b - - 1 1", [], [], "1-0", "checkmate"),  # over before it starts
    ],
)
def test_how_games_end(fen: str, white: list[str | None], black: list[str | None], result: str, reason: str) -> None:
    record = play_game(Scripted(*white), Scripted(*black), fen)
    assert (record.result, record.reason) == (result, reason)
    assert (record.fen, record.white, record.black) == (fen, "scripted", "scripted")
    assert record.white_score == {"1-0": 1.0, "1/2-1/2": 0.5, "0-1": 0.0, "*": None}[result]


def test_the_ply_limit_is_a_draw_after_exactly_that_many_plies() -> None:
    for plies in (1, 4, 7):
        record = play_game(RandomPlayer(1), RandomPlayer(2), max_plies=plies)
        assert (record.reason, record.result, len(record.moves)) == ("ply limit", "1/2-1/2", plies)


def test_finished_games_are_asked_no_more() -> None:
    white, black = Scripted("g6g7", "e2e4", "d2d4"), Scripted("e7e5", "d7d5")
    records = play_games([(white, black, "7k/8/5KQ1/8/8/8/8/8 w - - 0 1"), (white, black, START)], max_plies=4)
    assert [record.reason for record in records] == ["checkmate", "ply limit"]
    assert white.asked == [2, 1]


def test_bad_arguments() -> None:
    with pytest.raises(ParseError, match="too_many_kings"):
        play_game(RandomPlayer(), RandomPlayer(), "4k3/8/8/8/8/8/8/K3K3 w - - 0 1")
    assert play_games([]) == []


def test_an_engine_without_an_answer_voids_the_game() -> None:
    class Dead:
        def play(self, board: chess.Board) -> None:
            return None

    engine: Any = Dead()
    record = play_game(EnginePlayer(engine), RandomPlayer())
    assert (record.result, record.reason, record.white_score) == ("*", "no answer", None)


def test_an_untrained_model_loses_by_its_first_answer(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Under strict rules; under lenient ones it moves at random, so both games go on."""
    player = ModelPlayer(tiny_model, tiny_tokenizer, max_new_tokens=5)
    games = [(player, RandomPlayer(), START), (RandomPlayer(), player, START)]
    records = play_games(games, max_plies=6)
    assert [(record.reason, len(record.moves), record.first_illegal) for record in records] == [
        ("ply limit", 6, 0),
        ("ply limit", 6, 1),
    ]
    strict = [record.strict for record in records]
    assert [(record.result, record.reason) for record in strict] == [("0-1", "illegal move"), ("1-0", "illegal move")]
    assert [record.moves for record in strict] == [(), records[1].moves[:1]]
    again = play_games([(ModelPlayer(tiny_model, tiny_tokenizer, max_new_tokens=5), RandomPlayer(), START)], 6)
    assert again == records[:1]  # a random fallback follows from the seed and the position


@pytest.mark.parametrize(
    ("completion", "answer"), [(" M: e2e4 E: 0.3 B: a1a1", PolicyOutput(("e2e4",), (0.3,), "a1a1")), ("so so", None)]
)
def test_a_model_is_asked_by_p(
    completion: str, answer: Any, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def rollout(model: Any, prompt_ids: list[list[int]], **settings: Any) -> Any:
        given.update(settings, prompts=tiny_tokenizer.batch_decode(prompt_ids))
        ids = [*tiny_tokenizer(completion)["input_ids"], tiny_tokenizer.eos_token_id]
        return type("Rollout", (), {"completion_ids": [ids] * len(prompt_ids)})

    monkeypatch.setattr("rookworld_trl.chess.play.rollout", rollout)
    player = ModelPlayer(tiny_model, tiny_tokenizer, temperature=0.5, max_new_tokens=10_000)
    assert [choice.answer for choice in player.choose([chess.Board(), chess.Board()])] == [answer, answer]
    assert given["prompts"] == [f"P: {START}"] * 2
    assert given["temperature"] == 0.5
    assert given["max_new_tokens"] == 320 - len(tiny_tokenizer(f"P: {START}")["input_ids"])


class Answering(ModelPlayer):
    """A model's player with given answers."""

    def __init__(self, answers: list[Any]):
        super().__init__(None, None)  # type: ignore[arg-type]
        self.answers = answers

    def _answers(self, boards: Sequence[chess.Board]) -> list[Any]:
        return self.answers


OWN = PolicyOutput(("a2a3", "e2e4"), (0.1, 0.4), "a2a3")
BAD = PolicyOutput(("e2e5", "g1f3", "b1c3"), (9.0, 0.2, 0.3), "e2e5")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        (OWN, ("a2a3", "own")),
        (BAD, ("b1c3", "candidates")),  # its highest eval first, among the legal ones
        (PolicyOutput(("g1f3", "b1c3"), (0.2, 0.2), "a1a1"), ("g1f3", "candidates")),  # equal evals: as listed
    ],
)
def test_a_models_move_and_its_fallback(answer: Any, choice: Any) -> None:
    player = Answering([answer])
    assert player.choose([chess.Board()]) == [(*choice, answer)]


def test_the_greedy_capturer_takes_the_most_and_chooses_among_equals_at_random() -> None:
    pawn_or_queen = chess.Board("7k/8/8/1p3q2/2P1P3/8/8/K7 w - - 0 1")
    two_knights = chess.Board("7k/8/8/2n1n3/3P4/8/8/K7 w - - 0 1")
    player = GreedyCapturePlayer(seed=1)
    assert {choice.move for choice in player.choose([pawn_or_queen] * 20)} == {"e4f5"}
    assert {choice.move for choice in player.choose([two_knights] * 20)} == {"d4c5", "d4e5"}
    assert len({choice.move for choice in player.choose([chess.Board()] * 200)}) == 20  # nothing to take: any move


@pytest.mark.parametrize(
    ("fen", "moves", "result", "reason"),
    [
        (START, ["f2f3", "e7e5", "g2g4", "d8h4"], "0-1", "checkmate"),
        (START, ["e2e4", "e7e5"], "0-1", "illegal move"),
        ("4k3/P7/8/8/8/8/8/4K2R b K - 3 40", ["e8d7", "e1g1", "d7c7", "a7a8q"], "1/2-1/2", "ply limit"),
        (START, [], "*", "no answer"),
    ],
)
def test_python_chess_reads_the_pgn(fen: str, moves: list[str], result: Any, reason: str) -> None:
    """Two games one behind the other, as in a file."""
    record = GameRecord(fen, tuple(moves), result, reason, "model", "greedy capture")
    file = io.StringIO("\n".join(record.pgn("ladder", str(number)) for number in (1, 2)))
    for number in (1, 2):
        game = chess.pgn.read_game(file)
        assert game is not None
        assert not game.errors
        assert game.board().fen() == fen
        assert [move.uci() for move in game.mainline_moves()] == moves
        tags = ("Event", "Round", "White", "Black", "Result")
        assert [game.headers[tag] for tag in tags] == ["ladder", str(number), "model", "greedy capture", result]
        assert game.end().comment == reason
    assert chess.pgn.read_game(file) is None
