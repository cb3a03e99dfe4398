"""Problems: does the model's `B:` find the move, or the moves, that a test suite or a puzzle asks for?

Mate in one, test suites in EPD with best moves, moves to avoid or points, and puzzles of several moves have one shape:
positions in a row, and in each what every move is worth. A problem is worth the product, so that a puzzle counts only
if each of its moves is found. A move that checkmates ends it, whatever the file's line is, as on Lichess.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import chess

from rookworld_trl.chess import ParseError, policy
from rookworld_trl.chess.suite import Ask
from rookworld_trl.chess.trivial import PLAYERS, most_material
from rookworld_trl.measuring.metrics import Metric, mean, ratio, share
from rookworld_trl.measuring.result import Item, Result

Worths = Mapping[str, float]  # by UCI move, 1 for the best; moves that are not listed are worth nothing


@dataclass(frozen=True, slots=True)
class Problem:
    """Positions to find moves in.

    Attributes:
        name: its id.
        group: what its result is filed under.
        boards: the positions. Each stands behind the right move of the one before and the answer to it.
        worths: of each position.
        game: what the positions were taken from, "" if not known; intervals are over games where some share one.
    """

    name: str
    group: str
    boards: tuple[chess.Board, ...]
    worths: tuple[Worths, ...]
    game: str = ""


def run_problems(ask: Ask, problems: Sequence[Problem], name: str) -> Result:
    """Ask for a move in every position of every problem.

    All positions are asked at once, those behind a move that was not found too: they do not change what is solved, and
    legality is counted over all of them.

    Returns:
        One item a problem, with the answers joined by line ends.
    """
    prompts = [policy.prompt(board.fen()) for problem in problems for board in problem.boards]
    texts = iter(ask(prompts, name))
    items = [score_problem(problem, [next(texts) for _ in problem.boards]) for problem in problems]
    graded = any(value not in (0, 1) for problem in problems for worths in problem.worths for value in worths.values())
    return Result(name, _metrics(graded), items, players=PLAYERS["policy"])


def score_problem(problem: Problem, completions: Sequence[str]) -> Item:
    """Score the completions, one a position."""
    answers = [read_answer(board, text) for board, text in zip(problem.boards, completions, strict=True)]
    legal = [sorted(move.uci() for move in board.legal_moves) for board in problem.boards]
    firsts = [moves[0] for moves in legal]
    material = [most_material(board.fen(), moves) for board, moves in zip(problem.boards, legal, strict=True)]
    solved = worth(problem, [{answer.move: 1.0} for answer in answers])
    scores = {
        "solved": solved,
        "best": float(solved == 1),
        "in_candidates": float(any(problem.worths[0].get(move) == 1 for move in answers[0].candidates)),
        "legal": float(sum(bool(answer.move) for answer in answers)),
        "parsed": float(sum(answer.parsed for answer in answers)),
        "positions": float(len(answers)),
        "random.solved": worth(problem, [dict.fromkeys(moves, 1 / len(moves)) for moves in legal]),
        "first.solved": worth(problem, [{move: 1.0} for move in firsts]),
        "material.solved": worth(problem, [{move: 1.0} for move in material]),
    }
    prompts = [policy.prompt(board.fen()) for board in problem.boards]
    texts = "\n".join(prompts), "\n".join(completions)
    return Item(problem.name, scores, *texts, {"group": problem.group}, problem.game)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a `P:` completion says of a position: legal moves only, `move` empty if `B:` is not legal."""

    parsed: bool
    move: str
    candidates: tuple[str, ...]


def read_answer(board: chess.Board, completion: str) -> Answer:
    """Parse a `P:` completion against its position."""
    try:
        output = policy.parse(completion)
    except ParseError:
        return Answer(False, "", ())
    legal = {move.uci() for move in board.legal_moves}
    return Answer(True, output.best if output.best in legal else "", tuple(m for m in output.moves if m in legal))


def worth(problem: Problem, choices: Sequence[Mapping[str, float]]) -> float:
    """What a player gets for a problem who chooses moves with these probabilities, position by position."""
    value = 1.0
    for board, worths, chosen in reversed(list(zip(problem.boards, problem.worths, choices, strict=True))):
        found = [(move, share * worths[move]) for move, share in chosen.items() if worths.get(move)]
        value = sum(gained * (1.0 if is_mate(board, move) else value) for move, gained in found)
    return value


def is_mate(board: chess.Board, move: str) -> bool:
    """Whether a legal move checkmates."""
    after = board.copy(stack=False)
    after.push_uci(move)
    return after.is_checkmate()


def _metrics(graded: bool) -> list[Metric]:
    return [
        mean("solved", "points, of all", "percent") if graded else share("solved", "solved"),
        *([share("best", "full points")] if graded else []),
        share("in_candidates", "a best move among the candidates"),
        ratio("legal", "B legal", "positions"),
        ratio("parsed", "parsable", "positions"),
    ]
