"""Decision points of completions, which `rookworld_trl.training.exact` sums over: as plain data and as objects."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Decision:
    """A place in a completion where one of several actions is taken, and what each of them earns.

    Attributes:
        position: completion tokens before it.
        actions: token ids of each action; none is empty or the beginning of another, so that they exclude each other.
        rewards: what each action earns.
        otherwise: reward of everything else that may stand there.
        weight: the decision's in the objective.
    """

    position: int
    actions: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]
    otherwise: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.actions or len(self.actions) != len(self.rewards):
            raise ValueError(
                f"decision at token {self.position}: {len(self.actions)} actions and {len(self.rewards)} rewards; give "
                "at least one action, and one reward for each"
            )
        ordered = sorted(self.actions)
        # The beginning of a sequence sorts right before the sequences that it begins.
        for first, second in zip([(), *ordered], ordered, strict=False):
            if second[: len(first)] == first and (first or not second):
                raise ValueError(
                    f"decision at token {self.position}: action {list(first)} begins action {list(second)}, so their "
                    "probabilities cannot be added; end each action with a token that only follows it whole"
                )


@dataclass(frozen=True, slots=True)
class Determined:
    """Tokens that have one right value given the `position` completion tokens before them."""

    position: int
    tokens: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rest:
    """What a prompt's samples say about the completions that its one decision does not enumerate.

    Attributes:
        reward: the reward of this row's sample; None if it is one of the actions, whose part is exact.
        mean, variance: those of the rewards of all the prompt's samples that are none of the actions.
    """

    reward: float | None
    mean: float
    variance: float


@dataclass(frozen=True, slots=True)
class Points:
    """What is known about one sampled completion.

    Attributes:
        decisions, determined: in it; positions lie within the completion.
        rest: the actions of the only decision are whole completions, and others earn something, too: their part of
            the gradient is sampled.
    """

    decisions: tuple[Decision, ...] = ()
    determined: tuple[Determined, ...] = ()
    rest: Rest | None = None

    def __post_init__(self) -> None:
        if self.rest is not None and [each.position for each in self.decisions] != [0]:
            raise ValueError(
                "the rest is sampled only beside one decision at token 0, whose actions are whole completions; "
                f"found decisions at tokens {[each.position for each in self.decisions]}"
            )

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "Points":
        """From plain data: `decisions` and `determined` as lists of their classes' arguments, `rest` likewise.

        Raises:
            ValueError: it is not that; says what is wrong.
        """
        try:
            decisions = [
                Decision(**{**each, "actions": tuple(map(tuple, each["actions"])), "rewards": tuple(each["rewards"])})
                for each in plain.get("decisions", ())
            ]
            determined = [
                Determined(**{**each, "tokens": tuple(each["tokens"])}) for each in plain.get("determined", ())
            ]
            rest = None if plain.get("rest") is None else Rest(**plain["rest"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"decision points are not as `Decision` and `Determined` want them: {error!r}") from error
        return cls(tuple(decisions), tuple(determined), rest)


FindPoints = Callable[[dict[str, Any], Sequence[int]], Mapping[str, Any]]
"""Takes a row of the data set and the token ids of a completion sampled for it, end token included; gives `decisions`,
`determined` and, where the actions of the only decision are whole completions, `rest_is_sampled`."""


def points_of_batch(
    find: FindPoints,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float],
    samples: int,
    sample_rest: bool,
) -> list[dict[str, Any]]:
    """The points of sampled completions as plain data, which checkpoints keep and `Points.read` reads.

    Args:
        rows: rows of the data set, one for each completion; those of one prompt follow each other, `samples` at a time.
        completions: token ids, end token included; without any where it is masked, and then it has no points.
        rewards: each completion's; NaN where it has none.
        sample_rest: estimate what is not enumerated from the samples, where `find` says that there is something;
            otherwise it counts as 0.

    Raises:
        ValueError: points that are impossible, with the row.
    """
    found = []
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        plain = {"decisions": [], "determined": [], **(find(row, completion) if completion else {})}
        if plain.pop("rest_is_sampled", False):
            plain["rest"] = {"reward": rewards[number], "mean": 0.0, "variance": 0.0}
        try:
            known = Points.read(plain)
            positions = [each.position for each in known.decisions] + [each.position for each in known.determined]
            end = max(positions, default=-1)
            if end >= len(completion):
                raise ValueError(f"position {end} lies behind the completion's {len(completion)} tokens")
        except ValueError as error:
            raise ValueError(f"points of row {number}, prompt {row.get('prompt')!r}: {error}") from error
        if known.rest is None or not sample_rest:
            plain["rest"] = None
        elif tuple(completion) in known.decisions[0].actions or not math.isfinite(rewards[number]):
            plain["rest"]["reward"] = None
        found.append(plain)
    for start in range(0, len(found), samples):
        group = [each["rest"] for each in found[start : start + samples] if each["rest"] is not None]
        others = [each["reward"] for each in group if each["reward"] is not None]
        for rest in group:
            rest["mean"] = float(np.mean(others)) if others else 0.0
            rest["variance"] = float(np.var(others)) if others else 0.0
    return found


def check_points(objective: str, find_points: FindPoints | None) -> None:
    """Raises:
    ValueError: the exact gradient without decision points, or the sampled one with them.
    """
    if (objective == "sampled") != (find_points is None):
        raise ValueError(
            f"`objective` is {objective!r}: exact and mixed need the argument `find_points`, sampled does not use it. "
            "Give both or neither"
        )
