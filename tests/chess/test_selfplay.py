"""Self-play and the closed loop, with models that are scripted to err in known ways."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import chess
import pytest

from rookworld_trl.chess import environment
from rookworld_trl.chess.accuracy import Ask, ModelAnswers
from rookworld_trl.chess.selfplay import copier, run_selfplay
from rookworld_trl.measuring import result_table

Script = Callable[[str], str]


def scripted(script: Script) -> Ask:
    return lambda prompts, title: [script(prompt) for prompt in prompts]


def says(move: str) -> str:
    return f" M: {move} E: 0.1 B: {move}"


def oracle(choose: Callable[[chess.Board], str] = lambda board: next(iter(board.legal_moves)).uci()) -> Script:
    """A model that knows the rules, and plays `choose`."""

    def script(prompt: str) -> str:
        if prompt.startswith("P: "):
            return says(choose(chess.Board(prompt.removeprefix("P: "))))
        given = environment.parse_prompt(prompt)
        return environment.format_completion(environment.transition(given.fen, given.move))

    return script


def play(script: Script, **options: Any) -> Any:
    return run_selfplay(scripted(script), **{"games": 4, **options})


def test_a_faultless_model_reaches_the_limit() -> None:
    result = play(oracle(), max_plies=12)
    assert result.groups() == {("end", "ply limit"): 4}
    assert [item.scores["faultless_plies"] for item in result.items] == [12] * 4
    assert result.estimates()["faultless"]["value"] == 1
    # The copier's random moves are legal and its first answer is wrong.
    trivial = {"random move, input copied": 1.0}
    assert result.baselines()["legal_plies"] == trivial
    assert result.baselines()["faultless"] == {"random move, input copied": 0.0}


def test_games_end_with_the_game() -> None:
    mate = ["f2f3", "e7e5", "g2g4", "d8h4"]
    script = oracle(lambda board: mate[len(board.move_stack) + 2 * board.fullmove_number - 2 + (not board.turn)])
    result = play(script, games=1, opening_plies=0, max_plies=50)
    assert result.groups() == {("end", "game over"): 1}
    own = {k: v for k, v in result.items[0].scores.items() if not k.startswith("copier.")}
    assert own == {"legal_plies": 4, "faultless_plies": 4, "faultless": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda text: text.replace("+0.001+", "+0.002+"), "wrong reward or flag"),
        (lambda text: text.replace("+0+0", "+1+0"), "wrong reward or flag"),
        (lambda text: re.sub(r" \d+ (\d+\+)", r" 9 \1", text), "wrong position"),
        (lambda text: text + "+", "unparsable A:"),
    ],
)
def test_environment_faults_end_the_game(fault: Callable[[str], str], reason: str) -> None:
    script = oracle()
    faulty = play(
        lambda prompt: script(prompt) if prompt.startswith("P: ") else fault(script(prompt)), opening_plies=0, games=1
    )
    assert faulty.groups() == {("end", reason): 1}
    scores = faulty.items[0].scores
    assert [scores[name] for name in ("legal_plies", "faultless_plies", "faultless")] == [1, 0, 0]


@pytest.mark.parametrize(("text", "reason"), [(says("a1a1"), "illegal move"), ("junk", "unparsable P:")])
def test_policy_faults_end_the_game(text: str, reason: str) -> None:
    script = oracle()
    # White plays on, Black fails at its first move: one legal ply.
    result = play(
        lambda prompt: text if prompt.startswith("P: ") and " b " in prompt else script(prompt),
        opening_plies=0,
        games=2,
    )
    assert result.groups() == {("end", reason): 2}
    assert [item.scores["legal_plies"] for item in result.items] == [1, 1]


def test_history_reaches_the_prompt() -> None:
    prompts: list[str] = []
    script = oracle()
    play(lambda prompt: prompts.append(prompt) or script(prompt), games=1, max_plies=12)  # type: ignore[func-returns-value]
    last = environment.parse_prompt([prompt for prompt in prompts if prompt.startswith("A: ")][-1])
    assert len(last.history) == 10
    assert last.history[-1] == last.move


def test_openings_differ_and_are_seeded() -> None:
    runs = [play(oracle(), games=8, max_plies=1, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([item.prompt for item in run.items] for run in runs)
    assert first == again != other
    assert len(set(first)) > 4
    with pytest.raises(ValueError, match="games"):
        play(oracle(), games=0)


def test_selfplay_with_a_real_model(tiny_model: Any, tiny_tokenizer: Any) -> None:
    ask = ModelAnswers(tiny_model, tiny_tokenizer, {"policy": 1.0, "environment": 1.0}, max_new_tokens=8)
    result = run_selfplay(ask, games=3)
    assert result.groups() == {("end", "unparsable P:"): 3}
    assert len({item.completion for item in result.items}) == 3


def varied(board: chess.Board) -> str:
    """Neither the same squares again and again nor an early end."""
    moves = sorted(move.uci() for move in board.legal_moves)
    return moves[(7 * board.fullmove_number + 3) % len(moves)]


# The closed loop -----------------------------------------------------------------------------------------------------


def test_a_perfect_model_does_not_drift() -> None:
    result = play(oracle(varied), max_plies=45, go_on=True)
    got = {name: found["value"] for name, found in result.estimates().items()}
    assert (got["wrong"], got["right"], got["legal"], got["parsed"]) == (0, 1, 1, 1)
    assert (got["faultless_plies"], got["wrong_40"], got["wrong_80"]) == (45, 0, None)
    assert [item.scores["plies"] for item in result.items] == [45] * 4
    assert max(map(len, result_table([result]).splitlines())) <= 100
    assert result.baselines()["wrong_1"]["random move, input copied"] >= 2  # the move's two squares


def test_drift_by_hand_goes_on_after_a_fault() -> None:
    """A model that forgets the knight: 1. Nf3 leaves f3 empty (1 wrong), and then it knows the rules.

    1... e5 is right on both boards; 2. Ne5: the model's board has no knight to take with and it says e2e3.
    """
    script = oracle(lambda board: {1: "g1f3" if board.turn else "e7e5"}.get(board.fullmove_number, "e2e3"))

    def forgetful(prompt: str) -> str:
        return script(prompt).replace("/5N2/", "/8/", 1)

    result = play(forgetful, games=1, opening_plies=0, max_plies=3, go_on=True)
    (item,) = result.items
    assert [item.scores[f"wrong_{ply}"] for ply in (1, 2, 3)] == [1, 1, 1]
    assert item.groups == {"end": "wrong position"}
    assert item.completion.startswith("rnbqkbnr/pppppppp/8/8/8/8/"), "the first fault is kept"
    assert (item.scores["faultless_plies"], item.scores["legal"], item.scores["right"]) == (0, 3, 0)


def test_an_illegal_move_is_replaced_on_both_boards() -> None:
    script = oracle()
    result, again = (
        play(lambda p: says("a1a8") if p.startswith("P: ") else script(p), max_plies=30, go_on=True, seed=3)
        for _ in range(2)
    )
    assert result == again
    got = {name: found["value"] for name, found in result.estimates().items()}
    assert (got["legal"], got["wrong"], got["right"], got["faultless_plies"]) == (0, 0, 1, 0)
    assert result.groups() == {("end", "illegal move"): 4}


def test_the_move_in_place_of_an_illegal_one_is_drawn_from_all_that_are_legal() -> None:
    """Of 200 draws from the 20 first moves each comes up about 10 times, and its place in the list says nothing."""
    script, asked = oracle(), list[str]()

    def always_illegal(prompt: str) -> str:
        if prompt.startswith("P: "):
            return says("a1a1")
        asked.append(environment.parse_prompt(prompt).move)
        return script(prompt)

    for seed in (0, 0, 1):
        play(always_illegal, games=200, max_plies=1, opening_plies=0, go_on=True, seed=seed)
    first, again, other = (Counter(asked[start : start + 200]) for start in (0, 200, 400))
    assert set(first) == {move.uci() for move in chess.Board().legal_moves}
    assert max(first.values()) <= 25
    assert first == again != other


def test_what_does_not_parse_leaves_the_models_board_as_it_was() -> None:
    script = oracle()
    result = play(
        lambda prompt: script(prompt) if prompt.startswith("P: ") else "junk",
        games=1,
        opening_plies=0,
        max_plies=4,
        go_on=True,
    )
    assert result.estimates()["parsed"]["value"] == 0.5
    assert result.items[0].scores["wrong_1"] == 2
    assert result.items[0].scores["legal"] == 1, "its board stays the first one: 1. Nh3 is legal once"


def test_a_copier_scores_at_the_bottom() -> None:
    result = run_selfplay(copier(1), games=4, max_plies=20, go_on=True)
    got = {name: found["value"] for name, found in result.estimates().items()}
    assert got["right"] == 0
    assert got["wrong_10"] > 8
