"""Prompt mining: spend samples on prompts whose completions earn different rewards.

A group whose rewards all agree teaches a group baseline nothing, so such groups are dropped and other prompts of the
same part are sampled in their place (dynamic sampling, DAPO, arXiv 2503.14476), a bounded number of times. Which
prompts are tried is not left to chance. A group of n differs by pass and fail with probability m = 1 - p^n - (1 - p)^n;
if all pass or all fail, its rewards may still differ where they are graded, in a share q of such groups. So its chance
is m + (1 - m) q. The miner remembers p and q of each prompt as exponential averages; where a prompt has one right
completion, one forward pass over it gives p exactly, and says nothing of q.

A share of every part's prompts stays ordinary: it is trained on as it comes, so that what has become easy is not
forgotten, and its informative share says what the run would have had without mining.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rookworld_trl import ranks
from rookworld_trl.checkpointing.store import Remembers
from rookworld_trl.modeling.completions import target_logps
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin, Row
from rookworld_trl.training.sampler import TASK_COLUMN, Samples, task_of
from rookworld_trl.training.trainer import informative_groups

DECAY = 0.5  # share of the old average kept at a new observation
PASS_REWARD = 1.0  # from which on a completion passes
CANDIDATES = 4  # prompts looked at, by what is known of them, for each one that is sampled
# Names the parts (strata) whose shares of a batch are fixed by the data set's order.
PART_COLUMN = "batch_part"


def prompt_key(prompt: str) -> str:
    """A short name of a prompt that stays the same between runs and data sets."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def part_of(row: Mapping[str, Any]) -> str:
    """What a row may give way to another of: its task and, where a data set names one in `PART_COLUMN`, its part."""
    return "/".join(str(row[column]) for column in (TASK_COLUMN, PART_COLUMN) if column in row)


def informative_chance(pass_rate: float, samples: int) -> float:
    """Probability that of so many independent samples some pass and some fail: 1 - p^n - (1 - p)^n."""
    return 1.0 - pass_rate**samples - (1.0 - pass_rate) ** samples


class PromptMiner(Remembers):
    """What is known of every prompt, and which prompts to try next.

    Args:
        prompts, tasks: each row's of the data set; a prompt that occurs again counts once. A task here, as below, is
            what `part_of` says: rows of one never give way to rows of another.
        samples: completions of a group.
        ordinary: share of each task's prompts that are not mined.
        seed: seeds the draws.

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
        ordinary: float = 0.2,
        seed: int = 0,
    ):
        self.samples, self.ordinary, self.seed = samples, ordinary, seed
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
            passed, key = float((scored >= PASS_REWARD - 1e-6).mean()), prompt_key(prompt)
            if key not in self.pass_rates:
                self.priors[task] = 0.95 * self.priors.get(task, 1.0) + 0.05 * differs
            self._average(self.pass_rates, key, passed)
            if passed in (0.0, 1.0):
                self._average(self.shares, key, float(differs))
                hits, trials = self.graded.get(task, (0.0, 0.0))
                self.graded[task] = [0.99 * hits + differs, 0.99 * trials + 1.0]

    def _average(self, averages: dict[str, float], key: str, new: float) -> None:
        averages[key] = DECAY * averages.get(key, new) + (1 - DECAY) * new

    def set_pass_rate(self, row: int, pass_rate: float) -> None:
        """Replace the pass rate of a row's prompt by its exact one."""
        self.pass_rates[self.keys[row]] = pass_rate

    def weight(self, row: int, task: str) -> float:
        """How much a row is worth trying: the chance that its group is informative."""
        key, chance = self.keys[row], self.priors.get(task, 1.0)
        if key in self.pass_rates:
            hits, trials = self.graded.get(task, (1.0, 1.0))
            mixed = informative_chance(self.pass_rates[key], self.samples)
            chance = mixed + (1 - mixed) * self.shares.get(key, hits / trials)
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


@dataclass
class Mining(Plugin):
    """Replaces prompts whose groups teach nothing, before and after sampling them, task by task.

    The batch that TRL deals is a plan: it fixes how many groups each task has, and its ordinary share is kept. Every
    process takes part in sampling; the main process alone decides.

    Attributes:
        miner: what is known of every prompt.

    Raises:
        ValueError: mining where it cannot work: a data set without random access, sharded weights.
    """

    NAME = "mining"
    STATE = "miner"
    SOURCE = True
    SAMPLED = True

    mining: bool = option(False, "Sample other prompts of the same task where all rewards of a group agree.")
    mining_ordinary: float = option(
        0.2, "Share of each task's prompts in a batch that are trained on as they come.", least=0, most=1
    )
    mining_rounds: int = option(
        1, "How often groups that agree are sampled again from other prompts, at most.", least=0
    )

    @property
    def on(self) -> bool:
        return self.mining

    def attach(self, trainer: Any) -> None:
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.main = trainer.accelerator.is_main_process
        self.dataset, self.samples = trainer.train_dataset, trainer.args.num_generations
        self._ordinary: list[int] = []  # groups of the present batch that are not mined
        if not hasattr(self.dataset, "column_names") or not hasattr(self.dataset, "__len__"):
            raise ValueError("`mining` is True: it needs a data set with random access. Set `mining` to False")
        if ranks.sharded(self.accelerator):
            raise ValueError(
                "`mining` is True: it samples different numbers of rows on each process, which sharded weights cannot. "
                "Set `mining` to False"
            )
        prompts = list(self.dataset["prompt"])
        named = [name for name in (TASK_COLUMN, PART_COLUMN) if name in self.dataset.column_names]
        parts = [part_of(row) for row in self.dataset.select_columns(named)] or [""] * len(prompts)
        options = {"samples": self.samples, "seed": self.args.seed}
        self.miner = PromptMiner(prompts, parts, ordinary=self.mining_ordinary, **options)

    def state_dict(self) -> dict[str, Any]:
        return self.miner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.miner.load_state_dict(state)

    def rows(self, rows: list[Row]) -> Samples:
        """Choose prompts, sample them, and choose and sample again where all rewards of a group agree."""
        prompts, tasks = self._groups(rows)
        minable = ranks.decided(self.main, partial(self.miner.split, tasks))
        self._ordinary = sorted(set(range(len(tasks))) - set(minable))
        self._replace(rows, minable, prompts, tasks, planned=True)
        drawn = self.trainer.sample_rows(rows)
        resampled = 0
        for _ in range(self.mining_rounds):
            prompts, _ = self._groups(rows)
            rewards = self.trainer.reward_of(rows, drawn)
            informative = informative_groups(rewards, self.samples)
            flat = [group for group in minable if not informative[group]]
            if not flat:
                break
            dropped = np.concatenate([rewards[group * self.samples : (group + 1) * self.samples] for group in flat])
            self.miner.observe([prompts[group] for group in flat], [tasks[group] for group in flat], dropped)
            self._replace(rows, flat, prompts, tasks, planned=False)
            if mine := [row for row, _ in self._my_rows(flat, len(rows))]:
                drawn.put(mine, self.trainer.sample_rows([rows[row] for row in mine]))
            resampled += len(flat)
        self.trainer.record("mining/resampled", resampled / len(tasks))
        return drawn

    def rewarded(self, rows: list[Row], rewards: torch.Tensor) -> None:
        """Remember how the groups that are trained on fared."""
        earned, record = rewards.double().cpu().numpy(), self.trainer.record
        prompts, tasks = self._groups(rows)
        self.miner.observe(prompts, tasks, earned)
        passed = [rates[key] for key in map(prompt_key, prompts) if key in (rates := self.miner.pass_rates)]
        record("mining/pass_rate", sum(passed) / max(1, len(passed)))
        if self._ordinary:  # what the batch would have been without mining
            informative = informative_groups(earned, self.samples)[self._ordinary]
            record("mining/ordinary_informative", float(informative.mean()))

    # Steps of mining

    def _groups(self, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
        """Prompt and task (with its part) of every group of the global batch."""
        everyones = ranks.everyones([(row["prompt"], part_of(row)) for row in rows])
        prompts, tasks = zip(*everyones[:: self.samples], strict=True)
        return list(prompts), list(tasks)

    def _my_rows(self, groups: Sequence[int], count: int) -> list[tuple[int, int]]:
        """This process's rows (of `count`) that belong to some of the global groups: (row, place in `groups`)."""
        start = self.accelerator.process_index * count
        places = {group: place for place, group in enumerate(groups)}
        rows = ((row, places.get((start + row) // self.samples)) for row in range(count))
        return [(row, place) for row, place in rows if place is not None]

    def _replace(self, rows: list[Row], groups: list[int], prompts: list[str], tasks: list[str], planned: bool) -> None:
        """Give these groups other prompts of their tasks; if `planned`, theirs are among the candidates."""
        chosen = ranks.decided(self.main, lambda: self._choose(groups, prompts, tasks, planned))
        others = [None if number is None else self.dataset[number] for number in chosen]
        for row, place in self._my_rows(groups, len(rows)):
            other = others[place]
            if other is not None:
                rows[row] = other

    def _choose(self, groups: list[int], prompts: list[str], tasks: list[str], planned: bool) -> list[int | None]:
        """A row of the data set for each of these groups, None to leave it as it is."""
        miner = self.miner
        chosen: dict[int, int] = {}
        present = {prompt_key(prompt) for prompt in prompts}
        for task in sorted({tasks[group] for group in groups}):
            mine = [group for group in groups if tasks[group] == task]
            own = {miner.row_of[prompt_key(prompts[group])]: group for group in mine} if planned else {}
            wanted = CANDIDATES * len(mine) - len(own)
            candidates = [*own, *miner.draw(task, wanted, present)]
            contents = [self.dataset[row] for row in candidates]
            if contents and task_of(contents[0]) == self.args.target_task:
                self.measure_pass_rates(candidates, contents)
            picked = miner.pick(candidates, [miner.weight(row, task) for row in candidates], len(mine))
            present |= {miner.keys[row] for row in picked}
            stays = {own[row] for row in picked if row in own}
            others = [group for group in mine if group not in stays]
            # There are fewer rows than groups where the data has no other prompts.
            chosen |= dict(zip(others, (row for row in picked if row not in own), strict=False))
        return [chosen.get(group) for group in groups]

    def measure_pass_rates(self, rows: list[int], contents: list[Row]) -> None:
        """The exact probability that a sample is the right completion, by one forward pass over both."""
        sampler, tokenizer = self.trainer.sampler, self.trainer.processing_class
        request = sampler.request(contents[0])
        context = getattr(self.trainer.model.config, "max_position_embeddings", None) or float("inf")
        pairs: dict[int, tuple[list[int], list[int]]] = {}
        for row, content in zip(rows, contents, strict=True):
            target = sampler.target_ids(content)
            if target is None:
                continue
            prompt = tokenizer(text=content["prompt"])["input_ids"]
            if len(target) <= request.max_completion_length and len(prompt) + len(target) <= context:
                pairs[row] = prompt, list(target)
            else:
                self.miner.set_pass_rate(row, 0.0)  # cut off before its end
        size, pad = self.args.per_device_train_batch_size, tokenizer.pad_token_id
        logps = target_logps(self.trainer.model, list(pairs.values()), pad, size, request.temperature)
        for row, chance in zip(pairs, logps.double().exp().clamp(max=1.0).tolist(), strict=True):
            self.miner.set_pass_rate(row, chance)
