"""A search for `P:` completions that earn without knowledge of the values, on real rows.

What counts is the mean over rows. On a single row anything can be guessed, and where all moves are worth the same a
fixed text is the truth; so each candidate text is tried on many positions, and the best one found on train rows is
measured on dev rows. An adversary knows what a position allows (the legal moves) or not even that, never what a move
is worth. It may write other evals where few moves are legal, which says something about how the game stands.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.policy import format_completion
from rookworld_trl.chess.rewards import PolicyScore, score_policy

Row = dict[str, Any]
Pick = Callable[[Row, random.Random], list[str]]

SQUARES = [file + rank for file in "abcdefgh" for rank in "12345678"]


def random_legal(row: Row, rng: random.Random) -> list[str]:
    return rng.sample(row["legal_moves"], min(5, len(row["legal_moves"])))


def first_legal(row: Row, rng: random.Random) -> list[str]:
    return row["legal_moves"][:5]


def random_text(row: Row, rng: random.Random) -> list[str]:
    """Knows how moves are written and how many are asked for, not which are legal."""
    return ["".join(rng.sample(SQUARES, 2)) for _ in range(min(5, len(row["legal_moves"])))]


@dataclass(frozen=True)
class Template:
    """Evals in pawns, one row of them where at most five moves are legal, one up to 15, one beyond; noise; whose move
    is `B:`: that of an index, or (-1) that of the highest eval."""

    evals: tuple[tuple[float, ...], ...]
    noise: float = 0.0
    decimals: int = 1
    best: int = -1

    def complete(self, row: Row, pick: Pick, seed: int) -> str:
        rng = random.Random(f"{seed}:{row['prompt']}")
        moves, legal = pick(row, rng), len(row["legal_moves"])
        centre = self.evals[(legal > 5) + (legal > 15)]
        evals = [max(-1000.0, min(1000.0, eval + rng.gauss(0, self.noise))) for eval in centre[: len(moves)]]
        best = evals.index(max(evals)) if self.best < 0 else min(self.best, len(moves) - 1)
        return format_completion(moves, [f"{eval:.{self.decimals}f}" for eval in evals], moves[best])

    def changed(self, rng: random.Random) -> "Template":
        what = rng.random()
        if what < 0.15:
            return replace(self, best=rng.choice((-1, 0, 0, 1, 4)))
        if what < 0.3:
            return replace(self, noise=rng.choice((0.0, 0.01, 0.1, 0.5, 3.0)), decimals=rng.choice((1, 2, 4)))
        if what < 0.45:  # one row of evals everywhere
            return replace(self, evals=(rng.choice(self.evals),) * 3)
        size, rows = rng.choice((0.1, 1.0, 5.0)), [list(row) for row in self.evals]
        row = rng.randrange(3)
        if rng.random() < 0.5:  # the level
            shift = rng.gauss(0, size)
            rows[row] = [eval + shift for eval in rows[row]]
        else:  # the shape
            rows[row] = [eval + rng.gauss(0, size) * (rng.random() < 0.5) for eval in rows[row]]
        return replace(self, evals=tuple(map(tuple, rows)))


def everywhere(*evals: float) -> Template:
    return Template((evals,) * 3)


STARTS = [
    everywhere(0.0, 0.0, 0.0, 0.0, 0.0001),
    everywhere(0.5, 0.4, 0.3, 0.2, 0.1),
    everywhere(0.1, 0.2, 0.3, 0.4, 0.5),
    everywhere(-12.0, -15.0, -18.0, -20.0, -25.0),
    everywhere(12.0, 15.0, 18.0, 20.0, 25.0),
    everywhere(0.0, 0.0, 0.0, 0.0, -9.0),
    everywhere(-30.0, -30.0, -30.0, -30.0, -30.0),
    everywhere(-1000.0, -1000.0, -1000.0, -1000.0, -1000.0),
]


def scores_of(template: Template, rows: Sequence[Row], pick: Pick, seed: int = 0) -> list[PolicyScore]:
    return [score_policy(template.complete(row, pick, seed), row["legal_moves"], row["legal_cp"]) for row in rows]


def mean(scores: Sequence[PolicyScore], form: str) -> float:
    return sum(getattr(score, form) for score in scores) / len(scores)


def searched(
    rows: Sequence[Row], pick: Pick, form: str, rounds: int = 10, kept: int = 5, children: int = 12
) -> Template:
    """The template with the highest mean found by mutation and selection, from the known cheats on."""
    rng = random.Random(0)
    population = [(mean(scores_of(start, rows, pick), form), start) for start in STARTS]
    for _ in range(rounds):
        population = sorted(population, key=lambda pair: -pair[0])[:kept]
        parents = [rng.choice(population)[1] for _ in range(children)]
        population += [(mean(scores_of(child, rows, pick), form), child) for child in (p.changed(rng) for p in parents)]
    return max(population, key=lambda pair: pair[0])[1]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    """Train rows to search on, dev rows to measure on."""
    found = {}
    for split, count in (("train", 300), ("dev", 2000)):
        policy_rows = [row for row in load_shipped(split) if row["task"] == "policy"]
        found[split] = random.Random(0).sample(policy_rows, count)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["reward", "continuous"])
@pytest.mark.parametrize(
    ("pick", "most"),
    [
        (random_text, 0.0),  # no rules, no values
        (random_legal, 0.2),  # the rules
        (first_legal, 0.2),
    ],
)
def test_no_text_without_knowledge_of_the_values_pays(
    pick: Pick, most: float, form: str, rows: dict[str, list[Row]]
) -> None:
    """At most 0.2 in the mean over rows."""
    template = searched(rows["train"], pick, form)
    found = mean(scores_of(template, rows["dev"], pick, seed=1), form)
    assert found <= most, (found, template)
