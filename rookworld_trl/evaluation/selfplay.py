"""Self-play without a board: the model picks a move by `P:` and works out the next position by `A:`, ply after ply.

Python-chess follows along. A game ends when the model leaves the rules (a move that is illegal, a next position, a
reward or a flag that is wrong, a text that does not parse), when the game is over, or at the limit. How many plies it
lasts measures both tasks together: one fault a hundred plies is rare in a table of accuracies and ends most games.
"""

import random
from dataclasses import dataclass
from typing import Any

import chess
from transformers import PreTrainedModel

from rookworld_trl.evaluation.completions import complete, fitting_length
from rookworld_trl.evaluation.metrics import Metric
from rookworld_trl.evaluation.suite import SuiteItem, SuiteResult, answer
from rookworld_trl.play import random_opening
from rookworld_trl.tasks import ParseError, environment
from rookworld_trl.terminal import progress_bar

METRICS = [
    Metric("legal_plies", "legal plies a game", lambda s: s["legal_plies"], proportion=False, format=".1f"),
    Metric("faultless_plies", "faultless plies a game", lambda s: s["faultless_plies"], proportion=False, format=".1f"),
    Metric("faultless", "games without a fault", lambda s: s["faultless"]),
]

FAULTLESS = ("game over", "ply limit")


@dataclass(slots=True)
class _Game:
    board: chess.Board
    legal_plies: int = 0
    faultless_plies: int = 0
    end: str = ""
    prompt: str = ""
    completion: str = ""
    move: str = ""


def run_selfplay(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    games: int = 100,
    max_plies: int = 200,
    opening_plies: int = 2,
    temperature: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    progress: bool = False,
) -> SuiteResult:
    """Let the model play games against itself inside its own environment.

    Args:
        games: played side by side.
        max_plies: plies of the model at most; a game that gets there is faultless.
        opening_plies: random legal plies before the model takes over, so that greedy games differ.

    Returns:
        One item a game: `legal_plies` counts legal moves, `faultless_plies` those whose outcome was right too; the
        group is the reason why the game ended; prompt and completion are the last ones.

    Raises:
        ValueError: no games, or as in `complete`.
    """
    if games < 1 or max_plies < 1:
        raise ValueError(f"games and max_plies must be above 0; got {games} and {max_plies}")
    rng = random.Random(seed)
    played = [_Game(random_opening(rng, opening_plies)) for _ in range(games)]
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "batch_size": games}
    with progress_bar("self-play" if progress else "", max_plies, "ply") as bar:
        for _ in range(max_plies):
            running = [game for game in played if not game.end]
            if not running:
                break
            bar.set_postfix(games=len(running))
            _move(model, tokenizer, running, max_new_tokens, options)
            _advance(model, tokenizer, [game for game in running if not game.end], max_new_tokens, options)
            bar.update()
    for game in played:
        game.end = game.end or "ply limit"
    items = [_item(number, game) for number, game in enumerate(played)]
    settings = {"temperature": temperature, "seed": seed, "max_plies": max_plies, "opening_plies": opening_plies}
    return SuiteResult("self-play", settings, METRICS, items)


def _move(
    model: PreTrainedModel, tokenizer: Any, games: list[_Game], max_new_tokens: int, options: dict[str, Any]
) -> None:
    """Choose each game's next move by `P:`; a fault ends the game."""
    boards = [game.board for game in games]
    answers = answer(model, tokenizer, boards, max_new_tokens=max_new_tokens, **options)
    for game, given in zip(games, answers, strict=True):
        game.prompt, game.completion = given.prompt, given.completion
        if given.move is None:
            game.end = "illegal move" if given.parsed else "unparsable P:"
        else:
            game.legal_plies += 1
            game.move = given.move.uci()


def _advance(
    model: PreTrainedModel, tokenizer: Any, games: list[_Game], max_new_tokens: int, options: dict[str, Any]
) -> None:
    """Work out each game's next position by `A:`; a fault, or the end of the game, ends it."""
    if not games:
        return
    histories = [[move.uci() for move in game.board.move_stack] for game in games]
    prompts = [
        environment.prompt(game.board.fen(), game.move, history) for game, history in zip(games, histories, strict=True)
    ]
    room = fitting_length(model, tokenizer, prompts, max_new_tokens)
    completions = complete(model, tokenizer, prompts, max_new_tokens=room, **options)
    for game, prompt, completion in zip(games, prompts, completions, strict=True):
        game.prompt, game.completion = prompt, completion.text
        truth = environment.transition(game.board.fen(), game.move)
        try:
            predicted = environment.parse(completion.text)
        except ParseError:
            game.end = "unparsable A:"
            continue
        if predicted != truth:
            game.end = "wrong position" if predicted.fen != truth.fen else "wrong reward or flag"
            continue
        game.faultless_plies += 1
        game.board.push_uci(game.move)
        if truth.terminated:
            game.end = "game over"


def _item(number: int, game: _Game) -> SuiteItem:
    scores = {
        "legal_plies": float(game.legal_plies),
        "faultless_plies": float(game.faultless_plies),
        "faultless": float(game.end in FAULTLESS),
    }
    return SuiteItem(f"game {number}", game.end, game.prompt, game.completion, scores)
