"""Score of an `A:` completion against the true transition: per-field results, a graduated and a continuous reward.

The cheat to keep out is copying: a move changes two to four of 64 squares, so the unchanged input is always "96 %
right". Everything here is measured on the squares that the move changes, and copying earns the bottom level.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rookworld_trl.chess import environment
from rookworld_trl.chess.format import ParseError, squares
from rookworld_trl.chess.rewards.moves import LEVELS, UNPARSABLE

# Continuous form: half for the squares; the other half for what stands behind them, and only as far as they are right.
_SQUARES_SHARE = 0.5
_FEN_FIELD_SHARE = 0.05  # each of side to move, castling, en passant and the two clocks
_OUTCOME_SHARE = 0.25  # reward and both flags together: constant "nothing happened" flags are right 98.9 % of the time

# An illegal move changes nothing; distances are then measured against the two squares that a plain move would change.
_PLAIN_MOVE_SQUARES = 2


@dataclass(frozen=True, slots=True)
class EnvironmentScore:
    """What is right in one `A:` completion. An unparsable one has every field at its worst and no flag set.

    Attributes:
        parsed: the whole completion follows the format.
        exact: it equals the truth, character by character.
        fen_exact: all six FEN fields are right.
        placement_exact: all 64 squares are right.
        first_four: placement, side to move, castling rights and en-passant square are right.
        turn_exact: side to move.
        castling_exact: castling rights.
        en_passant_exact: en-passant square.
        halfmove_exact: half-move clock.
        fullmove_exact: move number.
        wrong_squares: how many of the 64 squares differ from the truth.
        similarity: 1 - d(prediction, truth) / d(input, truth) in squares, cut at 0. Copying the input scores 0.
        reward_exact: the reward's text is right.
        terminated_true: the truth's flag; with the next one for recall and F1.
        terminated_pred: the completion's flag.
        truncated_true: as above, of the second flag: an illegal move.
        truncated_pred: as above.
        copied_input: the board was left as it is although the move changes it.
        level: index into `LEVELS`, 0 (unparsable) to 5 (exact).
        reward: the graduated reward, `LEVELS[level]`.
        continuous: the continuous reward, in [-0.3, 1].
    """

    parsed: bool = False
    exact: bool = False
    fen_exact: bool = False
    placement_exact: bool = False
    first_four: bool = False
    turn_exact: bool = False
    castling_exact: bool = False
    en_passant_exact: bool = False
    halfmove_exact: bool = False
    fullmove_exact: bool = False
    wrong_squares: int = 64
    similarity: float = 0.0
    reward_exact: bool = False
    terminated_true: bool = False
    terminated_pred: bool = False
    truncated_true: bool = False
    truncated_pred: bool = False
    copied_input: bool = False
    level: int = 0
    reward: float = UNPARSABLE
    continuous: float = UNPARSABLE


class _Truth(NamedTuple):
    completion: str
    fields: list[str]  # the six FEN fields
    outcome: list[str]  # reward, terminated, truncated as text
    input_squares: str
    squares: str
    changed: int  # how many squares differ between input and truth; 0 for an illegal move
    arrivals: list[int]  # those of them that hold a man in the truth: where the moved ones arrive
    origin: int  # the square that the move leaves


def score_environment(prompt: str, completion: str, target: str | None = None) -> EnvironmentScore:
    """Score a completion of an `A:` prompt. Never raises on the completion, whatever it holds.

    Levels: unparsable; well-formed, or the input copied; at most 2 squares wrong, a moved man where it belongs and gone
    from where it stood, and the right side to move; the placement; the first four FEN fields; the entire string. Where
    the move is illegal and the board stays as it is, copying is the truth, so the truncated flag must be right first.

    Continuous: f(s) (1/2 + 1/2 · rest) with s = 1 - d(prediction, truth) / d(input, truth) and
    f(s) = (e^{3s} - 1) / (e^3 - 1); `rest` is the weighted share of right fields besides the squares. f is
    negative (above -0.053) for boards worse than a copy; there, and without a moved man where it belongs and gone from
    where it stood, the rest earns nothing.

    Args:
        prompt: `A: <FEN>+<move>+<history>+`.
        completion: the model's text without special tokens.
        target: the true completion; None computes it with python-chess (slow: about 0.2 ms).

    Raises:
        ParseError: the prompt or the target is malformed; that is an error in the data, not in the completion.
    """
    truth = _truth(prompt, target)
    try:
        predicted = environment.parse(completion)
    except ParseError:
        _, terminated, truncated = truth.outcome
        return EnvironmentScore(terminated_true=terminated == "1", truncated_true=truncated == "1")
    fen, *outcome = completion.split("+")
    fields = fen.split(" ")
    board = squares(fields[0])
    assert board is not None  # the parser has checked it

    wrong = 0 if board == truth.squares else sum(map(str.__ne__, board, truth.squares))
    right = list(map(str.__eq__, fields, truth.fields))
    turn, castling, en_passant, halfmove, fullmove = right[1:]
    first_four = wrong == 0 and turn and castling and en_passant
    truncated_true = truth.outcome[2] == "1"
    # Right squares prove nothing where the input was copied or wiped, where a man stands on both of its squares, nor
    # where an illegal move wasn't judged.
    if truth.changed:
        arrived = any(board[i] == truth.squares[i] for i in truth.arrivals)
        earned = arrived and board[truth.origin] == truth.squares[truth.origin]
    else:
        earned = predicted.truncated == truncated_true

    if completion == truth.completion:
        level = 5
    elif not earned:
        level = 1
    elif first_four:
        level = 4
    elif wrong == 0:
        level = 3
    else:
        level = 2 if wrong <= 2 and turn else 1

    similarity = 1.0 - wrong / (truth.changed or _PLAIN_MOVE_SQUARES)
    if not earned:
        similarity = min(similarity, 0.0)
    continuous = math.expm1(3.0 * similarity) / math.expm1(3.0)
    if similarity > 0.0:
        rest = _FEN_FIELD_SHARE * sum(right[1:]) + _OUTCOME_SHARE * (outcome == truth.outcome)
        continuous *= _SQUARES_SHARE + rest
    return EnvironmentScore(
        parsed=True,
        exact=level == 5,
        fen_exact=first_four and halfmove and fullmove,
        placement_exact=wrong == 0,
        first_four=first_four,
        turn_exact=turn,
        castling_exact=castling,
        en_passant_exact=en_passant,
        halfmove_exact=halfmove,
        fullmove_exact=fullmove,
        wrong_squares=wrong,
        similarity=max(similarity, 0.0),
        reward_exact=outcome[0] == truth.outcome[0],
        terminated_true=truth.outcome[1] == "1",
        terminated_pred=predicted.terminated,
        truncated_true=truncated_true,
        truncated_pred=predicted.truncated,
        copied_input=bool(truth.changed) and board == truth.input_squares,
        level=level,
        reward=LEVELS[level],
        continuous=continuous,
    )


@lru_cache(maxsize=4096)  # the samples of a group share their prompt
def _truth(prompt: str, target: str | None) -> _Truth:
    given = environment.parse_prompt(prompt)
    if target is None:
        target = environment.format_completion(environment.transition(given.fen, given.move))
    environment.parse(target)
    fen, *outcome = target.split("+")
    fields = fen.split(" ")
    before, after = squares(given.fen.split(" ", 1)[0]), squares(fields[0])
    if before is None or after is None:
        raise ParseError("fen", prompt, "write eight ranks of eight squares")
    changed = [i for i in range(64) if before[i] != after[i]]
    arrivals = [i for i in changed if after[i] != "."]
    origin = "abcdefgh".index(given.move[0]) + 8 * (8 - int(given.move[1]))
    return _Truth(target, fields, outcome, before, after, len(changed), arrivals, origin)
