"""The trainer's data economy: which prompts of a batch are trained on (see `rookworld_trl.training.mining`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from rookworld_trl.training import gates
from rookworld_trl.training.advantages import combine_rewards
from rookworld_trl.training.mining import PART_COLUMN, Curriculum, PromptMiner, part_of, prompt_key, useful_groups
from rookworld_trl.training.reward_trainer import RewardTrainer

Row = dict[str, Any]


@dataclass(slots=True)
class _Samples:
    """The completions of a batch's rows before TRL asks for them; lists by row."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logps: list[Any]
    recorded: list[Any]


class MiningTrainer(RewardTrainer):
    """Replaces prompts whose groups teach nothing, before and after sampling them, task by task.

    The batch that TRL deals is a plan: it fixes how many groups each task has, and its ordinary share is kept. Every
    process takes part in sampling; the main process alone decides.

    Args:
        curriculum: weighs the prompts that are tried; see `rookworld_trl.training.mining.Curriculum`.

    Raises:
        ValueError: mining where it cannot work: a data set without random access, sharded weights, tools.
    """

    def __init__(self, *args: Any, curriculum: Curriculum | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.miner: PromptMiner | None = None
        self._prepared: _Samples | None = None
        self._ordinary: list[int] = []  # groups of the present batch that are not mined
        if not self.args.mining:
            if curriculum is not None:
                raise ValueError("a `curriculum` weighs mined prompts: set `mining` to True")
            return
        self._check_mining()
        prompts = self.train_dataset["prompt"]
        columns = self.train_dataset.select_columns(
            [name for name in (self.args.task_column, PART_COLUMN) if name in self.train_dataset.column_names]
        )
        parts = [part_of(row, self.args.task_column) for row in columns] or [""] * len(prompts)
        self.miner = PromptMiner(
            list(prompts),
            parts,
            samples=self.num_generations,
            decay=self.args.mining_decay,
            pass_reward=self.args.mining_pass_reward,
            ordinary=self.args.mining_ordinary,
            candidates=self.args.mining_candidates,
            seed=self.args.seed,
            curriculum=curriculum,
        )

    def _check_mining(self) -> None:
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        problems = {
            "needs a data set with random access and text prompts": not hasattr(self.train_dataset, "column_names")
            or not hasattr(self.train_dataset, "__len__")
            or not isinstance(self.train_dataset[0]["prompt"], str),
            "samples different numbers of rows on each process, which sharded weights cannot": sharded,
            "samples in one turn, without tools or a rollout function": bool(self.tools or self.rollout_func),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"`mining` is True: it {problem}. Set `mining` to False")

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        """A new generation batch; `inputs` is changed in place where a prompt gives way to another of its task."""
        if self.miner is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._prepared = self._mine(inputs)
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._prepared = None

    def _mine(self, inputs: list[Row]) -> _Samples:
        """Choose prompts, sample them, and choose and sample again where all rewards of a group agree."""
        assert self.miner is not None
        samples = self.num_generations
        prompts, tasks = self._groups(inputs)
        minable: list[int] = self._decided(partial(self.miner.split, tasks))
        self._ordinary = sorted(set(range(len(tasks))) - set(minable))
        self._replace(inputs, minable, prompts, tasks, planned=True)
        drawn = self._sample(inputs)
        resampled = 0
        for _ in range(self.args.mining_rounds):
            prompts, _ = self._groups(inputs)
            rewards = self._probe(inputs, drawn)
            useful = useful_groups(rewards, samples)
            dull = [group for group in minable if not useful[group]]
            if not dull:
                break
            dropped = np.concatenate([rewards[group * samples : (group + 1) * samples] for group in dull])
            self.miner.observe([prompts[group] for group in dull], [tasks[group] for group in dull], dropped)
            self._replace(inputs, dull, prompts, tasks, planned=False)
            self._sample(inputs, dull, drawn)
            resampled += len(dull)
        self._metrics["train"]["mining/resampled"].append(resampled / len(tasks))
        return drawn

    def _calculate_rewards(self, inputs: list[Row], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Remember how the groups that are trained on fared."""
        per_function = super()._calculate_rewards(inputs, *args, **kwargs)
        if self.miner is not None and self.model.training:
            prompts, tasks = self._groups(inputs)
            rewards, metrics = self._combined(per_function), self._metrics["train"]
            self.miner.observe(prompts, tasks, rewards)
            passed = [rates[key] for key in map(prompt_key, prompts) if key in (rates := self.miner.pass_rates)]
            metrics["mining/pass_rate"].append(sum(passed) / max(1, len(passed)))
            if self._ordinary:  # what the batch would have been without mining
                useful = useful_groups(rewards, self.num_generations)[self._ordinary]
                metrics["mining/ordinary_useful"].append(float(useful.mean()))
        return per_function

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """What mining has sampled already, or new samples."""
        ready = self._prepared
        if ready is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if prompt_ids != ready.prompt_ids:
            raise RuntimeError("the batch's prompts are not those that mining sampled")
        if self._gates_pending:
            self._sampled = gates.Sampled(prompt_ids, ready.completion_ids, ready.recorded)
        return ready.completion_ids, None if None in ready.logps else ready.logps

    # Steps of mining

    def _groups(self, inputs: Sequence[Row]) -> tuple[list[str], list[str]]:
        """Prompt and task (with its part) of every group of the global batch."""
        rows = gather_object([(row["prompt"], part_of(row, self.args.task_column)) for row in inputs])
        prompts, tasks = zip(*rows[:: self.num_generations], strict=True)
        return list(prompts), list(tasks)

    def _decided(self, decide: Callable[[], Any]) -> Any:
        """What `decide()` returns on the main process; what it raises there is raised on every process."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = decide()
            except Exception as error:
                outcome[1] = error
        decision, failure = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        return decision

    def _my_rows(self, groups: Sequence[int], count: int) -> list[tuple[int, int]]:
        """This process's rows (of `count`) that belong to some of the global groups: (row, place in `groups`)."""
        start = self.accelerator.process_index * count
        places = {group: place for place, group in enumerate(groups)}
        rows = ((row, places.get((start + row) // self.num_generations)) for row in range(count))
        return [(row, place) for row, place in rows if place is not None]

    def _replace(
        self, inputs: list[Row], groups: list[int], prompts: list[str], tasks: list[str], planned: bool
    ) -> None:
        """Give these groups other prompts of their tasks; if `planned`, theirs are among the candidates."""
        chosen: list[int | None] = self._decided(lambda: self._choose(groups, prompts, tasks, planned))
        rows = [None if row is None else self.train_dataset[row] for row in chosen]
        for mine, place in self._my_rows(groups, len(inputs)):
            row = rows[place]
            if row is not None:
                inputs[mine] = row

    def _choose(self, groups: list[int], prompts: list[str], tasks: list[str], planned: bool) -> list[int | None]:
        """A row of the data set for each of these groups, None to leave it as it is."""
        miner = self.miner
        assert miner is not None
        chosen: dict[int, int] = {}
        present = {prompt_key(prompt) for prompt in prompts}
        for task in sorted({tasks[group] for group in groups}):
            mine = [group for group in groups if tasks[group] == task]
            own = {miner.row_of[prompt_key(prompts[group])]: group for group in mine} if planned else {}
            wanted = miner.candidates * len(mine) - len(own)
            candidates = [*own, *miner.draw(task, wanted, present)]
            contents = [self.train_dataset[row] for row in candidates]
            if contents and contents[0].get(self.args.task_column) == self.args.truth_task:
                self._measure_pass_rates(candidates, contents)
            weights = [miner.weight(row, task, each) for row, each in zip(candidates, contents, strict=True)]
            picked = miner.pick(candidates, weights, len(mine))
            present |= {miner.keys[row] for row in picked}
            stays = {own[row] for row in picked if row in own}
            others = [group for group in mine if group not in stays]
            # There are fewer rows than groups where the data has no other prompts.
            chosen |= dict(zip(others, (row for row in picked if row not in own), strict=False))
        return [chosen.get(group) for group in groups]

    def _measure_pass_rates(self, rows: list[int], contents: list[Row]) -> None:
        """The exact probability that a sample is the right completion, by one forward pass over both."""
        assert self.miner is not None
        truths = [self._truth_ids(content) for content in contents]
        prompt_ids, _, _ = self._tokenize_prompts([content["prompt"] for content in contents])
        limit = self._request(contents[0]).max_completion_length if contents else 0
        context = getattr(self.model.config, "max_position_embeddings", None) or float("inf")
        fits = [
            number
            for number, truth in enumerate(truths)
            if truth is not None and len(truth) <= limit and len(prompt_ids[number]) + len(truth) <= context
        ]
        for number, truth in enumerate(truths):
            if truth is not None and number not in fits:
                self.miner.set_pass_rate(rows[number], 0.0)  # cut off before its end
        if not fits:
            return
        pad = self.processing_class.pad_token_id
        longest = max(len(prompt_ids[number]) for number in fits)
        keep = max(len(truths[number] or ()) for number in fits)
        ids, mask = [], []
        for number in fits:
            prompt, truth = prompt_ids[number], truths[number] or ()
            left, right = longest - len(prompt), keep - len(truth)
            ids.append([*[pad] * left, *prompt, *truth, *[pad] * right])
            mask.append([0] * left + [1] * (len(prompt) + len(truth)) + [0] * right)
        device = self.accelerator.device
        tensors = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
        size = self.args.per_device_train_batch_size
        model = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), self._sampling([contents[number] for number in fits]):
            logps = self._get_per_token_logps_and_entropies(model, *tensors, keep, batch_size=size)[0]
        totals = (logps * tensors[1][:, -keep:]).sum(dim=1).double().exp().clamp(max=1.0)
        for number, total in zip(fits, totals.tolist(), strict=True):
            self.miner.set_pass_rate(rows[number], total)

    def _sample(self, inputs: list[Row], groups: Sequence[int] | None = None, into: _Samples | None = None) -> _Samples:
        """Sample this process's rows of some groups, or all its rows."""
        every = list(range(len(inputs)))
        rows = every if groups is None else [row for row, _ in self._my_rows(groups, len(inputs))]
        if into is None:
            into = _Samples(*([None] * len(inputs) for _ in range(4)))  # type: ignore[arg-type]
        if not rows:
            return into
        mine = [inputs[row] for row in rows]
        prompt_ids, images, fields = self._tokenize_prompts([row["prompt"] for row in mine])
        with self._sampling(mine):
            completion_ids, logps = self._generate_single_turn(prompt_ids, images, fields, self.num_generations)
        recorded = self._sampled.logps if self._sampled is not None else [None] * len(rows)
        for number, row in enumerate(rows):
            into.prompt_ids[row], into.completion_ids[row] = prompt_ids[number], completion_ids[number]
            into.logps[row] = None if logps is None else logps[number]
            into.recorded[row] = recorded[number]
        return into

    def _probe(self, inputs: list[Row], drawn: _Samples) -> np.ndarray:
        """Rewards (N,) of the global batch as it stands, without a trace in TRL's logs."""
        texts = self.processing_class.batch_decode(drawn.completion_ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in inputs]
        rewards = super()._calculate_rewards(inputs, prompts, texts, drawn.completion_ids)
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        return self._combined(rewards)

    def _combined(self, per_function: torch.Tensor) -> np.ndarray:
        return combine_rewards(per_function, self.reward_weights.to(per_function.device)).double().cpu().numpy()
