"""Where a sampled completion decides something whose every alternative has a known reward, for the exact gradient.

`P:` rows. The stored values know every legal move, so each slot of `M:` and `B:` is a decision point on the prefix that
the policy sampled. What a move earns there is what it adds to the reward (`moves.Stakes`), counted from what an illegal
move leaves of it:

    slot of M:   the candidate's share of the fine, and its gain, for a legal move that is not listed yet
    slot of E:   what it adds to the evals' score while the others stay as they are; in a right list, where an eval is
                 one token (of two decimals, up to its tenth)
    B:           the fine, and its gain, for a legal move of the list; less of the fine for one that is not in it

So what moves add over an answer is its reward, but for the evals, a constant of the position, and the squeeze below 0
(docs/rewards.md). The gradient leaves out what an earlier choice does to later ones: a listed move may be `B:`, and may
not be listed again.

What cannot be read at all is held off where it was seen to begin: behind a first square whose moves are all listed, or
that has none, one of the 64 second squares earns 1; behind an eval, what would be a further digit or point earns 0 and
everything else 1. (No other point knows of these places: on them rookworld-nano began to write numbers, or pieces, and
1 to 2 % of its answers could no longer be read.)

What has one right continuation is determined: the section names (so the number of candidates) with the spaces in front
of them, the eval of each listed legal move, the end, all in the spelling of the completion itself (`policy.Spelling`),
or in that of the row's `target` where it cannot be seen. A promotion where only one is legal needs no rule: its letter
is part of the action.

`A:` rows have one right answer, an action that earns 1. Its tokens are determined, too, at a small weight: the gradient
of a probability near 0 is near 0, and what is rare (illegal moves, mates) would be unlearned before it is learned. What
wrong answers earn (graduated credit) cannot be enumerated; `rest_is_sampled` says so.

The walk follows the sampled tokens. It ends where they leave the format; what should stand there is still determined.
The result is plain data, as `rookworld_trl.training.exact.Points` reads it.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

import chess
import numpy as np

from rookworld_trl.chess import policy, task_of
from rookworld_trl.chess.format import MOVE_PATTERN
from rookworld_trl.chess.rewards.moves import CANDIDATES_FINE, ILLEGAL_FINE, UNLISTED_FINE, Stakes, deviation, stakes_of
from rookworld_trl.chess.rewards.policy_score import believed, spelled

DECISION_WEIGHT = 2.0  # of a point of the reward
DETERMINED_WEIGHT = 0.3
# Of an eval's tokens: its last digits are chance, and at the weight of the others their gradient was most of a step's
# (rookworld-nano lost a tenth of its legal moves in five steps at a rate of 3e-4).
EVAL_WEIGHT = 0.05
NEAREST_EVALS = 32  # are the actions of an eval; others earn nothing
LEAST_EVALS = 50  # that are one token each, for evals to be decisions
ANSWER_WEIGHT, ANSWER_TOKENS_WEIGHT = 1.0, 0.1
FORMAT_WEIGHT = 0.5
_LONGEST = 12  # characters of a move or an eval, and then some

_MOVE = re.compile(f" {MOVE_PATTERN}")
_SQUARE = re.compile(" [a-h][1-8]")
_EVALS = {1: re.compile(r" -?[0-9]{1,4}\.[0-9]"), 2: re.compile(r" -?[0-9]{1,4}\.[0-9]{1,2}")}  # by decimals
_SECTIONS = {name: re.compile(f" {{0,{policy.MOST_SPACES}}}{name}:") for name in "MEB"}


class ChessPoints:
    """Finds the decision points and determined tokens of `P:` rows, however they are spelled, and of `A:` rows.

    Args:
        tokenizer: encodes a move, an eval or a section name by itself to the tokens it has inside a row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._texts: dict[int, str] = {}

    def __call__(self, row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
        """The points of a completion (token ids, its end token included) of a row of the data set.

        Returns:
            `decisions`, `determined` and `rest_is_sampled`, the arguments of `training.exact.Points`.
        """
        end = self._tokenizer.eos_token_id
        if task_of(row["prompt"]) == "environment":
            answer = [*self.ids(row["target"]), end]
            decision = {"position": 0, "actions": [answer], "rewards": [1.0], "weight": ANSWER_WEIGHT}
            determined = {"position": 0, "tokens": answer, "weight": ANSWER_TOKENS_WEIGHT}
            return {"decisions": [decision], "determined": [determined], "rest_is_sampled": True}
        texts = "".join(map(self.text, completion)), row.get("target") or ""
        spelling = next(filter(None, map(policy.spelling_of, texts)), policy.SINGLE)
        walk = _Walk(self, completion, spelling)
        fen_width = len(row["prompt"]) - len(policy.PREFIX)
        _walk_policy(walk, dict(zip(row["legal_moves"], row["legal_cp"], strict=True)), fen_width, end)
        return {"decisions": walk.decisions, "determined": walk.determined, "rest_is_sampled": False}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    @cached_property
    def evals(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The tokens that are an eval by themselves, what they say, and the win chance that they say."""
        texts = [(token, self.text(token)) for token in range(len(self._tokenizer))]
        found = [(token, float(text)) for token, text in texts if _EVALS[2].fullmatch(text)]
        evals = [eval for _, eval in found]
        return (
            [token for token, _ in found],
            np.array(evals),
            np.array([policy.win_chance(100 * each) for each in evals]),
        )

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


class _Walk:
    """A place in a completion, and what was found on the way there."""

    def __init__(self, points: ChessPoints, completion: Sequence[int], spelling: policy.Spelling) -> None:
        self._points, self._completion, self.spelling, self.at = points, list(completion), spelling, 0
        self.ids = points.ids
        self.decisions: list[dict[str, Any]] = []
        self.determined: list[dict[str, Any]] = []

    @property
    def ended(self) -> bool:
        return self.at >= len(self._completion)

    def decide(self, earned: dict[str, float]) -> None:
        """One of these moves is taken here, and adds so much to the reward.

        The largest is written as a weight, the others as shares of it: where decisions are scaled by their deviation,
        what is at stake in each stays.
        """
        if not self.ended and earned:
            self.decide_among(self.at, [self.ids(f" {move}") for move in earned], list(earned.values()))

    def decide_among(self, position: int, actions: list[list[int]], earned: list[float]) -> None:
        if (most := max(earned)) > 1e-6:
            point = {"position": position, "actions": actions, "rewards": [each / most for each in earned]}
            self.decisions.append({**point, "weight": DECISION_WEIGHT * most})

    def stay_in_format(self, at: int, tokens: Iterable[int], allowed: bool) -> None:
        """Behind `at` completion tokens one of these must stand, or must not."""
        if at < len(self._completion):
            actions = [[token] for token in sorted(set(tokens))]
            point = {"position": at, "actions": actions, "rewards": [float(allowed)] * len(actions)}
            self.decisions.append({**point, "otherwise": float(not allowed), "weight": FORMAT_WEIGHT})

    def weigh_evals(self, places: Sequence[int], evals: Sequence[str], true_cp: Sequence[int], stakes: Stakes) -> None:
        """Each eval of a right list earns what it adds to the evals' score while the others stay as they are: how much
        nearer to the truth it is than the best list's spread, and the pairs that it orders (`policy_score`)."""
        tokens, known, chances_said = self._points.evals
        if len(tokens) < LEAST_EVALS or not stakes.evals or stakes.deviation <= 1e-9:
            return
        chances = np.array([policy.win_chance(cp) for cp in true_cp])
        written = np.array([believed(float(eval), cp) for eval, cp in zip(evals, true_cp, strict=True)])
        width = min(deviation(chances.tolist()), stakes.deviation)
        for place, cp, chance in zip(places, true_cp, chances, strict=True):
            said = np.where(np.isin(known, list(spelled(cp))), chance, chances_said)
            nearest = np.argsort(np.abs(said - chance), kind="stable")[:NEAREST_EVALS]
            near = np.maximum(0.0, width - np.abs(said[nearest] - chance))
            # Each pair counts in the slots of both of its evals, and from 0 on: turned round it earns nothing.
            apart = chance - chances
            right = 1 + np.sign(said[nearest, None] - written) * np.sign(apart)
            ordered = (right * np.abs(apart)).sum(1)
            earned = stakes.evals / 2 * (near / stakes.deviation / len(places) + ordered / stakes.apart)
            self.decide_among(place, [[tokens[number]] for number in nearest], earned.tolist())

    def finish_square(self, moves: Collection[str]) -> None:
        """If the move that begins here has a first square from which none of these moves goes, a second one follows."""
        start = self.at
        square = self.take(_SQUARE)
        behind, self.at = self.at, start
        if square is None or any(f" {move}".startswith(square) for move in moves):
            return
        written = self._completion[start:behind]
        whole = [self.ids(square + other) for other in chess.SQUARE_NAMES]
        # A tokenizer may put both squares into one token, and then there is nothing to finish.
        followers = [ids[len(written)] for ids in whole if ids[: len(written)] == written and len(ids) > len(written)]
        if followers:
            self.stay_in_format(behind, followers, allowed=True)

    def end_eval(self) -> str | None:
        """The eval that stands here, if any, and go on behind it; neither digits nor a second point follow it."""
        decimals = self.spelling.decimals or 2
        text = self.take(_EVALS[decimals])
        if text is None:
            return None
        # 1.2 may go on to 1.25 where the policy writes two decimals; 12.0 may not, unless it writes 12.07.
        whole = len(text.rpartition(".")[2]) == decimals or (self.spelling.decimals and abs(float(text)) >= 10)
        further = ".0123456789" if whole else "."
        self.stay_in_format(self.at, [self.ids(each)[0] for each in further], allowed=False)
        return text

    def determine(self, tokens: list[int], weight: float = DETERMINED_WEIGHT) -> bool:
        """These tokens must stand here; whether they do. If so, the walk goes on behind them."""
        if self.ended:
            return False
        self.determined.append({"position": self.at, "tokens": tokens, "weight": weight})
        there = self._completion[self.at : self.at + len(tokens)] == tokens
        self.at += len(tokens) if there else 0
        return there

    def section(self, name: str, width: int) -> bool:
        """A section's name must stand here, behind a field of so many characters; whether it does. Other spaces in
        front of it than must be there do not end the walk: the reward may read them all the same."""
        there = self.determine(self.ids(self.spelling.section(name, width)))
        return there or self.take(_SECTIONS[name], policy.MOST_SPACES + 2) is not None

    def take(self, pattern: re.Pattern[str], longest: int = _LONGEST) -> str | None:
        """The longest text from here on that the pattern matches and that ends with a token; None if there is none."""
        text, found = "", None
        for place in range(self.at, len(self._completion)):
            text += self._points.text(self._completion[place])
            if pattern.fullmatch(text):
                found, self.at = text, place + 1
            elif found is not None or len(text) > longest:
                break
        return found


def _walk_policy(walk: _Walk, values: dict[str, int], fen_width: int, end: int) -> None:
    stakes = stakes_of(tuple(values.values()))
    gains, expected = dict(zip(values, stakes.gains, strict=True)), stakes.expected
    if not walk.section("M", fen_width):
        return
    listed: list[str] = []
    for _ in range(expected):
        unlisted = {move: gain for move, gain in gains.items() if move not in listed}
        kept = CANDIDATES_FINE / expected
        walk.decide({move: kept + stakes.per_gain_of_candidate * gain for move, gain in unlisted.items()})
        walk.finish_square(unlisted)
        move = walk.take(_MOVE)
        if move is None:
            return
        listed.append(move[1:])
    if not walk.section("E", len(" ".join(listed))):
        return
    evals: list[str] = []
    places: list[int] = []
    for move in listed:
        start = walk.at
        if move in values:
            walk.determine(walk.ids(f" {policy.format_eval(values[move], walk.spelling.decimals)}"), EVAL_WEIGHT)
            walk.at = start
        written = walk.end_eval()
        if written is None:
            return
        evals.append(written)
        places.append(start)
    if len(set(listed) & set(values)) == expected:
        walk.weigh_evals(places, evals, [values[move] for move in listed], stakes)
    if not walk.section("B", len("".join(evals)) - 1):
        return
    walk.finish_square(gains)
    earned = {move: ILLEGAL_FINE + stakes.per_gain_of_best * gain for move, gain in gains.items()}
    walk.decide({move: each - UNLISTED_FINE * (move not in listed) for move, each in earned.items()})
    if walk.take(_MOVE) is not None:
        walk.determine([*walk.ids(walk.spelling.end), end])
