"""Boards of held-out items: what the model answered beside what is right, as SVG that shares its pieces and squares.

A `P:` item shows its position with the candidate moves as arrows, coloured by value, and the chosen move's squares
filled. An `A:` item shows the true next position and the predicted ones, with the wrong squares filled.
"""

import functools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import chess
import chess.svg

# Value of a move, 1 minus the win chance it gives away: at least this much has this colour. Okabe and Ito's hues,
# from blue over yellow to red, so that good and bad differ in every kind of colour vision.
VALUES = ((0.99, "#0072B2", "best"), (0.95, "#56B4E9", "good"), (0.85, "#E69F00", "weak"), (0.0, "#D55E00", "bad"))
ILLEGAL, PLAYED, WRONG, CHOSEN = "#8A1C1C", "#555555", "#E0384B", "#F7E26B"
SIZE = 390  # side of a board's coordinate system, as chess.svg draws it with coordinates
legend: Mapping[str, Any] = {"size": SIZE, "values": VALUES, "illegal": ILLEGAL, "wrong": WRONG, "chosen": CHOSEN}

PER_KIND = 12  # items shown of each task and kind
_ELEMENT = re.compile(r"<g .*?</g>|<(?:rect|use|line|polygon|circle)\b[^>]*/>", flags=re.DOTALL)
_PARTS = re.compile(r"M:(?P<moves>.*?)(?:E:.*?)?(?:B:(?P<best>.*))?$", flags=re.DOTALL)
_MOVE = re.compile(r"[a-h][1-8][a-h][1-8][qrbn]?")


Text = tuple[str, tuple[tuple[str, bool], ...]]  # label; words, each with whether it is wrong


@dataclass(frozen=True, slots=True)
class Board:
    """One drawn position: its caption and its SVG elements, to stand behind the frame of its orientation."""

    caption: str
    elements: str
    flipped: bool


@dataclass(frozen=True, slots=True)
class Card:
    """One held-out item.

    Attributes:
        kinds: why it is shown: `improved`, `worse` or `random`.
        score: its continuous reward, as text.
        texts: the prompt's and each completion's.
    """

    run: str
    task: str
    stratum: str
    kinds: tuple[str, ...]
    score: str
    boards: tuple[Board, ...]
    texts: tuple[Text, ...]


def shared_definitions() -> str:
    """Pieces, and for each orientation the frame with its squares: what every board refers to, once a page."""
    pieces = "".join(chess.svg.PIECES[symbol] for symbol in chess.svg.PIECES)
    frames = "".join(
        f'<symbol id="frame-{color}" viewBox="0 0 {SIZE} {SIZE}">{"".join(_frame(orientation))}</symbol>'
        for color, orientation in (("white", chess.WHITE), ("black", chess.BLACK))
    )
    return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{pieces}{frames}</defs></svg>'


def gallery(name: str, evaluations: Mapping[str, list[Mapping[str, Any]]]) -> list[Card]:
    """Cards of a run's held-out items by greedy decoding: the most improved, the worst, and some drawn at random.

    None before the run has ended.

    Args:
        name: the run's.
        evaluations: as its files hold them, by `before` and `after`.
    """
    answers = {when: _greedy(results) for when, results in evaluations.items()}
    if len(answers) < 2:
        return []
    first, last = answers.values()
    shared = [key for key in first if key in last]
    cards = []
    for task in dict.fromkeys(first[key]["task"] for key in shared):
        mine = [key for key in shared if first[key]["task"] == task]
        for key, kinds in _picked(mine, first, last, random.Random(0)).items():
            cards.append(_card(name, kinds, {when: found[key] for when, found in answers.items()}))
    return cards


def _greedy(results: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    greedy = [result for result in results if result["mode"] == "greedy"]
    return {item["name"]: {**item, "task": result["name"]} for result in greedy for item in result["items"]}


def _picked(
    keys: Sequence[str], first: Mapping[str, Any], last: Mapping[str, Any], draw: random.Random
) -> dict[str, tuple[str, ...]]:
    """Which items are shown, and as what."""
    gain = {key: last[key]["scores"]["continuous"] - first[key]["scores"]["continuous"] for key in keys}
    shuffled = draw.sample(keys, len(keys))
    ordered = {
        "improved": sorted((key for key in shuffled if gain[key] > 0), key=lambda key: -gain[key]),
        "worse": sorted((key for key in shuffled if gain[key] < 0), key=lambda key: gain[key]),
        "random": shuffled,
    }
    kinds: dict[str, list[str]] = {}
    for kind, ranked in ordered.items():
        for key in ranked[:PER_KIND]:
            kinds.setdefault(key, []).append(kind)
    return {key: tuple(found) for key, found in kinds.items()}


def _card(run: str, kinds: tuple[str, ...], answers: Mapping[str, Mapping[str, Any]]) -> Card:
    item = next(iter(answers.values()))
    reference = item["reference"]
    draw = _policy if item["task"] == "policy" else _environment
    score = " → ".join(f"{answer['scores']['continuous']:.2f}" for answer in answers.values())
    texts: list[Text] = [("prompt", ((item["prompt"], False),))]
    if item["task"] == "environment":
        texts += [(name, tuple(_marked(answer["completion"], reference))) for name, answer in answers.items()]
        texts.append(("right", ((reference, False),)))
    else:
        texts += [(name, ((answer["completion"], False),)) for name, answer in answers.items()]
    completions = {name: answer["completion"] for name, answer in answers.items()}
    boards = tuple(draw(item["prompt"], completions, reference))
    return Card(run, item["task"], item["groups"]["stratum"], kinds, score, boards, tuple(texts))


def _policy(prompt: str, completions: Mapping[str, str], values: Mapping[str, float]) -> Iterator[Board]:
    board = chess.Board(prompt.removeprefix("P: ").strip())
    best = max(values, key=lambda move: values[move])
    for name, completion in completions.items():
        found = _PARTS.search(completion)
        moves = _MOVE.findall(found["moves"]) if found else []
        chosen = (found["best"] or "").strip() if found else ""
        arrows = [_arrow(move, values) for move in dict.fromkeys(moves) if move != chosen]
        caption, fill = f"{name}: {chosen[:12]}, illegal" if chosen else f"{name}: no move", {}
        if chosen in values:
            caption = f"{name}: {chosen}, value {values[chosen]:.2f}"
        if _MOVE.fullmatch(chosen):
            arrows.append(_arrow(chosen, values))
            fill = {chess.parse_square(chosen[:2]): CHOSEN, chess.parse_square(chosen[2:4]): CHOSEN}
        if values.get(chosen, -1.0) < values[best]:
            caption += f"; best {best}"
        yield Board(caption, _elements(board, board.turn, arrows, fill), board.turn == chess.BLACK)


def _arrow(move: str, values: Mapping[str, float]) -> chess.svg.Arrow:
    color = next(color for least, color, _ in VALUES if values[move] >= least) if move in values else ILLEGAL
    return chess.svg.Arrow(chess.parse_square(move[:2]), chess.parse_square(move[2:4]), color=f"{color}CC")


def _environment(prompt: str, completions: Mapping[str, str], right: str) -> Iterator[Board]:
    fen, move, *_ = prompt.removeprefix("A: ").split("+")
    turn = " b " not in fen
    true = chess.BaseBoard(right.split(" ")[0])
    arrow = chess.svg.Arrow(chess.parse_square(move[:2]), chess.parse_square(move[2:4]), color=f"{PLAYED}AA")
    yield Board(f"right, after {move}", _elements(true, turn, [arrow]), not turn)
    for name, completion in completions.items():
        try:
            board = chess.BaseBoard(completion.strip().split(" ")[0])
        except ValueError:
            yield Board(f"{name}: no position", _elements(None, turn), not turn)
            continue
        wrong = [square for square in chess.SQUARES if board.piece_at(square) != true.piece_at(square)]
        squares = f"{len(wrong)} wrong square{'s' if len(wrong) != 1 else ''}" if wrong else "all squares right"
        drawn = _elements(board, turn, (), dict.fromkeys(wrong, WRONG))
        yield Board(f"{name}: {'exact' if completion == right else squares}", drawn, not turn)


def _marked(text: str, right: str) -> Iterator[tuple[str, bool]]:
    """The text's FEN fields, reward and flags, each with whether it differs from the right one's."""
    words, expected = re.findall(r"[^ +]+[ +]?", text), re.findall(r"[^ +]+[ +]?", right)
    for place, word in enumerate(words):
        yield word, place >= len(expected) or word != expected[place]


def _elements(
    board: chess.BaseBoard | None,
    orientation: chess.Color,
    arrows: Sequence[chess.svg.Arrow] = (),
    fill: Mapping[chess.Square, str] | None = None,
) -> str:
    """What chess.svg draws beyond the frame of an empty board."""
    drawn = chess.svg.board(board, orientation=orientation, arrows=arrows, fill=dict(fill or {}), size=SIZE)
    frame = set(_frame(orientation))
    kept = [each for each in _ELEMENT.findall(drawn.partition("</defs>")[2] or drawn) if each not in frame]
    return re.sub(r' (?:xlink:href|class)="[^"]*"', "", "".join(kept))


@functools.cache
def _frame(orientation: chess.Color) -> list[str]:
    return _ELEMENT.findall(chess.svg.board(None, orientation=orientation, size=SIZE))
