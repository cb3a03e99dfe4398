"""Exact mixing of the two tasks: every batch of prompts holds the same number of `A:` prompts (and of rare strata).

Drawing each row at random would only keep the ratio on average; at 64 prompts and 20 % the standard deviation of the
count is 3.2, and the tasks' reward levels differ, so the batch mean and deviation would wander with it.

TRL's `RepeatSampler` without shuffling cuts the data set, in order, into runs of
`generation_batch_size // num_generations` prompts. So the order is made here, and the sampler leaves it alone: set
`shuffle_dataset: false`.

The stages of a curriculum are shares of prompts and a temperature, until a step or a pass rate:

    stages:
      - {until_pass_rate: 0.6, mix_env_ratio: 0.75, temperature: 1.0}
      - {until_step: 200, mix_env_ratio: 0.5, policy_strata: {check: 0.25}}
      - {temperature: 0.7}

What a stage does not name is as in the rest of the recipe.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from rookworld_trl.chess.format import board_from_fen
from rookworld_trl.chess.policy import parse_prompt

SETTINGS = ("mix_env_ratio", "policy_strata", "temperature")  # of a stage
ENDS = ("until_step", "until_pass_rate")
Stage = Mapping[str, Any]


def prompts_of(share: float, prompts: int, field: str) -> int:
    """How many of `prompts` a share makes. A share is taken as rounded (0.1667) that is a hundredth of a prompt off.

    Raises:
        ValueError: the share is outside [0, 1], or is no whole number of prompts; the message names `field` and gives
            the nearest ones.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`{field}` is {share}: it is a share. Write a number from 0 to 1")
    exact = share * prompts
    count = round(exact)
    if abs(exact - count) > 0.01:
        below, above = int(exact), int(exact) + 1
        raise ValueError(
            f"`{field}` is {share}: {exact:g} of {prompts} prompts a batch is no whole number. "
            f"Write {below / prompts:g} ({below} prompts) or {above / prompts:g} ({above}), "
            "or change the number of prompts (generation_batch_size / num_generations)"
        )
    return count


def mix(
    dataset: Dataset,
    mix_env_ratio: float,
    *,
    prompts_per_batch: int,
    batches: int,
    seed: int,
    policy_strata: Mapping[str, float] | None = None,
) -> Dataset:
    """Order rows so that each run of `prompts_per_batch` rows holds exactly the ratio of `A:` rows.

    Each part (`A:`, each stratum that has a share, the other `P:` rows) goes through all of its rows in a random order
    before any row comes again, then through another order, independently of the others. Within a batch no row occurs
    twice, and the parts alternate evenly.

    Args:
        dataset: rows of both tasks with a `task` column. The result is a view by index.
        mix_env_ratio: share of `A:` prompts in every batch.
        prompts_per_batch: distinct prompts in a generation batch.
        batches: how many batches to lay out.
        seed: the same seed gives the same order.
        policy_strata: shares of a batch's `P:` prompts by stratum, for what is rare and too hard to be learned in
            passing: "check", the side to move being in check, or a name in the column `stratum`. What is not named
            fills the rest as it occurs.

    Returns:
        A data set of `batches * prompts_per_batch` rows; with `policy_strata` it has a column `batch_part`, each row's
        stratum or task, by which prompt mining keeps the shares.

    Raises:
        ValueError: a share is impossible for the batch, or a part has fewer rows than a batch takes of it.
    """
    shares = dict(policy_strata or {})
    environment = prompts_of(mix_env_ratio, prompts_per_batch, "mix_env_ratio")
    policy = prompts_per_batch - environment
    counts = {name: prompts_of(share, policy, f"policy_strata: {name}") for name, share in shares.items()}
    if sum(counts.values()) > policy:
        raise ValueError(f"`policy_strata` is {shares}: its shares exceed 1. They are shares of the `P:` prompts")
    tasks = np.asarray(dataset["task"])
    strata = _strata(dataset) if shares else np.full(len(tasks), "")
    listed = np.isin(strata, list(shares))
    parts = [("task 'environment'", tasks == "environment", environment)]
    parts += [("task 'policy'", (tasks == "policy") & ~listed, policy - sum(counts.values()))]
    parts += [(f"stratum '{name}'", (tasks == "policy") & (strata == name), count) for name, count in counts.items()]
    draws: list[Iterator[list[int]]] = []
    for number, (name, mask, count) in enumerate(parts):
        rows = np.flatnonzero(mask)
        if len(rows) < count:
            raise ValueError(
                f"the data set has {len(rows)} rows of {name}, a batch takes {count}. Change `mix_env_ratio` "
                f"({mix_env_ratio}) or `policy_strata`, use fewer prompts a batch ({prompts_per_batch}), or add rows"
            )
        # Its own generator for each part: changing a share leaves the order within every part as it was.
        draws.append(_endless(rows, count, np.random.default_rng([seed, number])))
    if shares:
        names = np.where(listed & (tasks == "policy"), strata, tasks)
        dataset = dataset.add_column("batch_part", names.tolist())
    order: list[int] = []
    for _ in range(batches):
        drawn = [next(draw) for draw in draws]
        order += _spread(drawn[1:] + drawn[:1])
    return dataset.select(order)


def _strata(dataset: Dataset) -> np.ndarray:
    """Each row's stratum: "check" for a `P:` prompt whose side to move is in check, else what the column says."""
    column = dataset["stratum"] if "stratum" in dataset.column_names else [None] * len(dataset)
    names = []
    for task, prompt, name in zip(dataset["task"], dataset["prompt"], column, strict=True):
        check = task == "policy" and board_from_fen(parse_prompt(prompt)).is_check()
        names.append("check" if check else str(name))
    return np.asarray(names)


def _endless(rows: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Batches of `count` distinct rows, pass after pass over all rows, each pass in a new order."""
    queue: list[int] = []
    while True:
        batch, queue = queue[:count], queue[count:]
        if len(batch) < count:
            # The seam between two passes: what the batch already holds waits until after it.
            order = rng.permutation(rows).tolist()
            held = set(batch)
            fresh = [row for row in order if row not in held]
            missing = count - len(batch)
            batch, queue = batch + fresh[:missing], fresh[missing:]
            for row in (row for row in order if row in held):
                queue.insert(int(rng.integers(len(queue) + 1)), row)
        yield batch


def _spread(parts: Sequence[Sequence[int]]) -> list[int]:
    """The parts merged, each in its order and spread evenly over the result."""
    places = [((i + 0.5) / len(part), part[i]) for part in parts for i in range(len(part))]
    return [row for _, row in sorted(places, key=lambda place: place[0])]


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises:
    ValueError: one message that names the stage and the key.
    """
    begins = 0
    for number, stage in enumerate(stages, start=1):
        where, ends = f"stages: stage {number}", any(stage.get(name) is not None for name in ENDS)
        if unknown := sorted(set(stage) - {*SETTINGS, *ENDS}):
            raise ValueError(f"{where} has a key '{unknown[0]}'; the keys are {', '.join((*ENDS, *SETTINGS))}")
        if ends == (number == len(stages)):
            what = "is the last and lasts to the end; remove its" if ends else "would never end; give it an"
            raise ValueError(f"{where} {what} `until_step` or `until_pass_rate`")
        for name, least, most, wanted in (
            ("until_step", begins + 1, math.inf, f"a step after {begins}, where it may begin"),
            ("until_pass_rate", 1e-9, 1, "a share above 0, to 1 at most"),
            ("temperature", 1e-9, math.inf, "a number above 0"),
        ):
            value = stage.get(name)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                raise ValueError(f"{where}: `{name}` is {value!r}; write {wanted}")
        begins = stage.get("until_step") or begins


def lay_out(
    dataset: Dataset,
    stages: Sequence[Stage],
    mix_env_ratio: float,
    policy_strata: Mapping[str, float] | None,
    temperature: float,
    **sizes: int,
) -> Dataset:
    """Each stage's rows for a whole run, one stage after the other; see `mix` for the arguments.

    Returns:
        The rows, with the columns `place` (in the stage) and `temperature`.
    """
    parts = []
    for number, stage in enumerate(stages, start=1):
        strata = stage.get("policy_strata", policy_strata)
        try:
            part = mix(dataset, stage.get("mix_env_ratio", mix_env_ratio), **sizes, policy_strata=strata)
        except ValueError as error:
            raise ValueError(f"stages: stage {number}: {error}") from error
        part = part.add_column("place", list(range(len(part))))
        parts.append(part.add_column("temperature", [float(stage.get("temperature", temperature))] * len(part)))
    return concatenate_datasets(parts)
