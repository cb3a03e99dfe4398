"""Prompt mining: spend samples on prompts whose completions earn different rewards.

A group whose rewards all agree teaches a group baseline nothing, so such groups are dropped and other prompts of the
same part are sampled in their place (dynamic sampling, DAPO, arXiv 2503.14476), a bounded number of times. Which
prompts are tried is not left to chance. A group of n differs by pass and fail with probability m = 1 - p^n - (1 - p)^n;
if all pass or all fail, its rewards may still differ where they are graded, in a share q of such groups. So its chance
is m + (1 - m) q. The miner remembers p and q of each prompt as exponential averages; where a prompt has one right
completion, one forward pass over it gives p exactly, and says nothing of q.

A share of every part's prompts stays ordinary: it is trained on as it comes, so that what has become easy is not
forgotten, and its informative share says what the run would have had without mining. Nothing here knows a trainer.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rookworld_trl.checkpointing.state import Remembers

Curriculum = Callable[[Mapping[str, Any], float | None], float]
"""Gives the weight, 0 or more, of trying a prompt: called with the row of the data set and the prompt's pass rate so
far, or None. It multiplies the chance that the prompt's group will be informative."""


# Names the parts (strata) whose shares of a batch are fixed by the data set's order.
PART_COLUMN = "batch_part"


def prompt_key(prompt: str) -> str:
    """A short name of a prompt that stays the same between runs and data sets."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def part_of(row: Mapping[str, Any], task_column: str) -> str:
    """What a row may give way to another of: its task and, where a data set names one in `PART_COLUMN`, its part."""
    return "/".join(str(row[column]) for column in (task_column, PART_COLUMN) if column in row)


def informative_chance(pass_rate: float, samples: int) -> float:
    """Probability that of so many independent samples some pass and some fail: 1 - p^n - (1 - p)^n."""
    return 1.0 - pass_rate**samples - (1.0 - pass_rate) ** samples


def informative_groups(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Which groups (N / samples,) hold different rewards (N,); NaN do not count."""
    groups = rewards.reshape(-1, samples)
    highest = np.where(np.isnan(groups), -np.inf, groups).max(axis=1)
    lowest = np.where(np.isnan(groups), np.inf, groups).min(axis=1)
    return highest - lowest > 1e-6


def informative_share(rewards: torch.Tensor, samples: int) -> float:
    """Share of such groups; the others teach a group baseline nothing."""
    return informative_groups(rewards.cpu().numpy(), samples).mean(dtype=np.float32).item()


class PromptMiner(Remembers):
    """What is known of every prompt, and which prompts to try next.

    Args:
        prompts, tasks: each row's of the data set; a prompt that occurs again counts once. A task here, as below, is
            what `part_of` says: rows of one never give way to rows of another.
        samples: completions of a group.
        decay: share of the old average kept at a new observation.
        pass_reward: the reward from which on a completion passes.
        ordinary: share of each task's prompts that are not mined.
        seed: seeds the draws.
        curriculum: weighs prompts beside their chance to be informative; see `Curriculum`.

    Attributes:
        pass_rates: p by prompt key, an exponential average or exact.
        shares: q by prompt key, an exponential average, of prompts with a group that all passed or all failed.
        graded: by task, how many of its latest groups of that kind differed and how many there were, discounted: what
            to expect of a prompt that has shown none.
        priors: by task, the informative share of prompts at their first observation: what to expect of an unknown one.
        draws: random decisions taken so far; each has its own generator, so that a resumed run goes on alike.
    """

    REMEMBERED = ("pass_rates", "shares", "graded", "priors", "draws")

    def __init__(
        self,
        prompts: Sequence[str],
        tasks: Sequence[str],
        *,
        samples: int,
        decay: float = 0.5,
        pass_reward: float = 1.0,
        ordinary: float = 0.2,
        seed: int = 0,
        curriculum: Curriculum | None = None,
    ):
        self.samples, self.decay, self.pass_reward, self.ordinary = samples, decay, pass_reward, ordinary
        self.seed, self.curriculum = seed, curriculum
        self.keys = [prompt_key(prompt) for prompt in prompts]
        self.row_of: dict[str, int] = {}
        for row, key in enumerate(self.keys):
            self.row_of.setdefault(key, row)
        self.rows: dict[str, list[int]] = {}  # distinct prompts by task
        for row in self.row_of.values():
            self.rows.setdefault(tasks[row], []).append(row)
        self.pass_rates: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.graded: dict[str, list[float]] = {}
        self.priors: dict[str, float] = {}
        self.draws = 0

    def observe(self, prompts: Sequence[str], tasks: Sequence[str], rewards: np.ndarray) -> None:
        """Remember how groups fared: G prompts with their tasks, and their rewards (G * samples,), NaN for none."""
        informative = informative_groups(rewards, self.samples)
        for prompt, task, group, differs in zip(
            prompts, tasks, rewards.reshape(-1, self.samples), informative.tolist(), strict=True
        ):
            scored = group[~np.isnan(group)]
            if not len(scored):
                continue
            passed, key = float((scored >= self.pass_reward - 1e-6).mean()), prompt_key(prompt)
            if key not in self.pass_rates:
                self.priors[task] = 0.95 * self.priors.get(task, 1.0) + 0.05 * differs
            self._average(self.pass_rates, key, passed)
            if passed in (0.0, 1.0):
                self._average(self.shares, key, float(differs))
                hits, trials = self.graded.get(task, (0.0, 0.0))
                self.graded[task] = [0.99 * hits + differs, 0.99 * trials + 1.0]

    def _average(self, averages: dict[str, float], key: str, new: float) -> None:
        averages[key] = self.decay * averages.get(key, new) + (1 - self.decay) * new

    def set_pass_rate(self, row: int, pass_rate: float) -> None:
        """Replace the pass rate of a row's prompt by its exact one."""
        self.pass_rates[self.keys[row]] = pass_rate

    def _chance(self, key: str, task: str) -> float:
        """Probability that a group of this prompt will be informative."""
        if key not in self.pass_rates:
            return self.priors.get(task, 1.0)
        hits, trials = self.graded.get(task, (1.0, 1.0))
        mixed = informative_chance(self.pass_rates[key], self.samples)
        return mixed + (1 - mixed) * self.shares.get(key, hits / trials)

    def weight(self, row: int, task: str, content: Mapping[str, Any] | None = None) -> float:
        """How much a row is worth trying: its chance to be informative, times what the curriculum says of `content`."""
        key = self.keys[row]
        chance = self._chance(key, task)
        if self.curriculum is not None and content is not None:
            factor = self.curriculum(content, self.pass_rates.get(key))
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"the curriculum weighs row {row} with {factor}: return a finite number, 0 or more")
            chance *= factor
        return max(chance, 1e-6)  # never nothing: the policy changes, and what is known of a prompt gets old

    def split(self, tasks: Sequence[str]) -> list[int]:
        """Which of the groups with these tasks may be mined: all but each task's ordinary share (rounded)."""
        rng = self._rng()
        mined: list[int] = []
        for task in sorted(set(tasks)):
            groups = [number for number, name in enumerate(tasks) if name == task]
            mined += rng.permutation(groups).tolist()[round(self.ordinary * len(groups)) :]
        return sorted(mined)

    def draw(self, task: str, count: int, exclude: set[str]) -> list[int]:
        """Rows of a task to look at: half of them seen before, drawn by their weights, half of them new.

        Args:
            exclude: keys of prompts not to draw; fewer than `count` rows come back if there are no others.
        """
        rng = self._rng()
        free = [row for row in self.rows.get(task, []) if self.keys[row] not in exclude]
        seen = [row for row in free if self.keys[row] in self.pass_rates]
        new = [row for row in free if self.keys[row] not in self.pass_rates]
        from_seen = min(len(seen), max(count // 2, count - len(new)))
        drawn = _weighted(seen, [self.weight(row, task) for row in seen], from_seen, rng)
        return drawn + [new[i] for i in rng.permutation(len(new))[: count - len(drawn)]]

    def pick(self, rows: Sequence[int], weights: Sequence[float], count: int) -> list[int]:
        """`count` of these distinct rows, drawn by their weights."""
        return _weighted(rows, weights, count, self._rng())

    def _rng(self) -> np.random.Generator:
        self.draws += 1
        return np.random.default_rng([self.seed, self.draws])


def _weighted(rows: Sequence[int], weights: Sequence[float], count: int, rng: np.random.Generator) -> list[int]:
    """Draw `count` rows without replacement, each time in proportion to the weights of those left.

    By the exponential clocks of Efraimidis and Spirakis 2006: the smallest of E / w, E ~ Exp(1).
    """
    clocks = rng.exponential(size=len(rows)) / np.asarray(weights, dtype=float)
    return [rows[i] for i in np.argsort(clocks)[:count]]
