"""Mining in a batch: which prompts are sampled and trained on (see `rookworld_trl.training.mining`)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rookworld_trl import ranks
from rookworld_trl.training.mining import PART_COLUMN, Curriculum, PromptMiner, informative_groups, part_of, prompt_key
from rookworld_trl.training.monitor import target_logps
from rookworld_trl.training.sampler import Sampler, Samples

Row = dict[str, Any]

CANDIDATES = 4  # prompts looked at, by what is known of them, for each one that is sampled


class BatchMiner:
    """Replaces prompts whose groups teach nothing, before and after sampling them, task by task.

    The batch that TRL deals is a plan: it fixes how many groups each task has, and its ordinary share is kept. Every
    process takes part in sampling; the main process alone decides.

    Args:
        args: the configuration.
        accelerator: for the processes' shares of a batch.
        policy: the model, for exact pass rates.
        dataset: the rows to choose from.
        tokenizer: makes the prompts' tokens.
        sampler: knows the settings of tasks and the right completions of rows.
        sample: draws a completion for each row.
        reward: gives the rewards (N,) of the global batch, from this process's rows and samples.
        curriculum: weighs the prompts that are tried; see `rookworld_trl.training.mining.Curriculum`.

    Attributes:
        miner: what is known of every prompt.

    Raises:
        ValueError: mining where it cannot work: a data set without random access, sharded weights.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        policy: Any,
        dataset: Any,
        tokenizer: Any,
        sampler: Sampler,
        *,
        sample: Callable[[list[Row]], Samples],
        reward: Callable[[list[Row], Samples], np.ndarray],
        curriculum: Curriculum | None = None,
    ):
        self.args, self.accelerator, self.policy, self.dataset = args, accelerator, policy, dataset
        self.tokenizer, self.sampler, self.sample, self.reward = tokenizer, sampler, sample, reward
        self.samples = args.num_generations
        self._ordinary: list[int] = []  # groups of the present batch that are not mined
        self._check()
        prompts = list(dataset["prompt"])
        named = [name for name in (args.task_column, PART_COLUMN) if name in dataset.column_names]
        parts = [part_of(row, args.task_column) for row in dataset.select_columns(named)] or [""] * len(prompts)
        self.miner = PromptMiner(
            prompts,
            parts,
            samples=self.samples,
            ordinary=args.mining_ordinary,
            seed=args.seed,
            curriculum=curriculum,
        )

    def _check(self) -> None:
        problems = {
            "needs a data set with random access and text prompts": not hasattr(self.dataset, "column_names")
            or not hasattr(self.dataset, "__len__")
            or not isinstance(self.dataset[0]["prompt"], str),
            "samples different numbers of rows on each process, which sharded weights cannot": ranks.sharded(
                self.accelerator
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"`mining` is True: it {problem}. Set `mining` to False")

    def choose(self, rows: list[Row], metrics: dict[str, list[float]]) -> Samples:
        """Choose prompts, sample them, and choose and sample again where all rewards of a group agree.

        Args:
            rows: this process's; changed in place where a prompt gives way to another of its task.
        """
        prompts, tasks = self._groups(rows)
        minable: list[int] = self._decided(partial(self.miner.split, tasks))
        self._ordinary = sorted(set(range(len(tasks))) - set(minable))
        self._replace(rows, minable, prompts, tasks, planned=True)
        drawn = self.sample(rows)
        resampled = 0
        for _ in range(self.args.mining_rounds):
            prompts, _ = self._groups(rows)
            rewards = self.reward(rows, drawn)
            informative = informative_groups(rewards, self.samples)
            flat = [group for group in minable if not informative[group]]
            if not flat:
                break
            dropped = np.concatenate([rewards[group * self.samples : (group + 1) * self.samples] for group in flat])
            self.miner.observe([prompts[group] for group in flat], [tasks[group] for group in flat], dropped)
            self._replace(rows, flat, prompts, tasks, planned=False)
            if mine := [row for row, _ in self._my_rows(flat, len(rows))]:
                drawn.put(mine, self.sample([rows[row] for row in mine]))
            resampled += len(flat)
        metrics["mining/resampled"].append(resampled / len(tasks))
        return drawn

    def observe(self, rows: list[Row], rewards: np.ndarray, metrics: dict[str, list[float]]) -> None:
        """Remember how the groups that are trained on fared, by the rewards (N,) of the global batch."""
        prompts, tasks = self._groups(rows)
        self.miner.observe(prompts, tasks, rewards)
        passed = [rates[key] for key in map(prompt_key, prompts) if key in (rates := self.miner.pass_rates)]
        metrics["mining/pass_rate"].append(sum(passed) / max(1, len(passed)))
        if self._ordinary:  # what the batch would have been without mining
            informative = informative_groups(rewards, self.samples)[self._ordinary]
            metrics["mining/ordinary_informative"].append(float(informative.mean()))

    # Steps of mining

    def _groups(self, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
        """Prompt and task (with its part) of every group of the global batch."""
        everyones = ranks.everyones([(row["prompt"], part_of(row, self.args.task_column)) for row in rows])
        prompts, tasks = zip(*everyones[:: self.samples], strict=True)
        return list(prompts), list(tasks)

    def _decided(self, decide: Callable[[], Any]) -> Any:
        return ranks.decided(self.accelerator.is_main_process, decide)

    def _my_rows(self, groups: Sequence[int], count: int) -> list[tuple[int, int]]:
        """This process's rows (of `count`) that belong to some of the global groups: (row, place in `groups`)."""
        start = self.accelerator.process_index * count
        places = {group: place for place, group in enumerate(groups)}
        rows = ((row, places.get((start + row) // self.samples)) for row in range(count))
        return [(row, place) for row, place in rows if place is not None]

    def _replace(self, rows: list[Row], groups: list[int], prompts: list[str], tasks: list[str], planned: bool) -> None:
        """Give these groups other prompts of their tasks; if `planned`, theirs are among the candidates."""
        chosen: list[int | None] = self._decided(lambda: self._choose(groups, prompts, tasks, planned))
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
            if contents and contents[0].get(self.args.task_column) == self.args.target_task:
                self.measure_pass_rates(candidates, contents)
            weights = [miner.weight(row, task, each) for row, each in zip(candidates, contents, strict=True)]
            picked = miner.pick(candidates, weights, len(mine))
            present |= {miner.keys[row] for row in picked}
            stays = {own[row] for row in picked if row in own}
            others = [group for group in mine if group not in stays]
            # There are fewer rows than groups where the data has no other prompts.
            chosen |= dict(zip(others, (row for row in picked if row not in own), strict=False))
        return [chosen.get(group) for group in groups]

    def measure_pass_rates(self, rows: list[int], contents: list[Row]) -> None:
        """The exact probability that a sample is the right completion, by one forward pass over both."""
        request = self.sampler.request(contents[0])
        context = getattr(self.policy.config, "max_position_embeddings", None) or float("inf")
        pairs: dict[int, tuple[list[int], list[int]]] = {}
        for row, content in zip(rows, contents, strict=True):
            target = self.sampler.target_ids(content)
            if target is None:
                continue
            prompt = self.tokenizer(text=content["prompt"])["input_ids"]
            if len(target) <= request.max_completion_length and len(prompt) + len(target) <= context:
                pairs[row] = prompt, list(target)
            else:
                self.miner.set_pass_rate(row, 0.0)  # cut off before its end
        size, pad = self.args.per_device_train_batch_size, self.tokenizer.pad_token_id
        logps = target_logps(self.policy, list(pairs.values()), pad, size, request.temperature)
        for row, chance in zip(pairs, logps.double().exp().clamp(max=1.0).tolist(), strict=True):
            self.miner.set_pass_rate(row, chance)
