"""Self-play, with models that are scripted to err in known ways."""

import re
from collections.abc import Callable
from typing import Any

import chess
import pytest

from rookworld_trl.chess import environment
from rookworld_trl.chess.accuracy import Ask, ModelAnswers
from rookworld_trl.chess.selfplay import run_selfplay

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
    ask = ModelAnswers(tiny_model, tiny_tokenizer, 1.0, max_new_tokens=8)
    result = run_selfplay(ask, games=3)
    assert result.groups() == {("end", "unparsable P:"): 3}
    assert len({item.completion for item in result.items}) == 3
