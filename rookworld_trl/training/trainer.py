"""GRPO on TRL's trainer, with the numbers checked: the story of a step, from the prompts to the update.

Each seam of TRL's is taken once, in the order in which a step meets it; each calls `super()` and hands what is special
to an object with one job. `tests/training/test_trl_seams.py` pins the seams, so that an upgrade of TRL fails there.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing.store import Stateful
from rookworld_trl.checkpointing.trainer import DurableGRPOTrainer
from rookworld_trl.modeling.completions import completion_texts
from rookworld_trl.training import gates, loss, placement, scoring
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.exact import ExactObjective, FindPoints
from rookworld_trl.training.kl import RECOVERY_BETA, KLPenalty
from rookworld_trl.training.loss import Scale
from rookworld_trl.training.plugin import Plugin, Row, check_plugins, settings_of
from rookworld_trl.training.preparation import check_built, prepare, trl_built_here, weights_on_disk
from rookworld_trl.training.recovery import NO_REWARDS, Diverged, Guard
from rookworld_trl.training.sampler import Sampler, Samples, task_of
from rookworld_trl.training.scoring import Scorer

logger = logging.get_logger(__name__)


class RookWorldGRPOTrainer(DurableGRPOTrainer):
    """TRL's `GRPOTrainer`, made right for left-padded GPT-2 and refusing to train on wrong numbers.

    * position ids follow the mask and dropout is off, in policy and reference; weights that train are float32;
    * a model passed as an object gets a reference with its own starting weights, not those its name points to;
    * completions come from `args.rollout_backend`, with the log-probs they were sampled at;
    * the first batch passes the gates of `rookworld_trl.training.gates`, or `GateError` is raised before any update;
    * advantages and KL have a choice of estimators and controls; where rewards are known, the gradient may be exact;
    * a step with a NaN or Inf in it is skipped and undone (`rookworld_trl.training.recovery`).

    Args:
        model: a causal language model, or its folder or name.
        reward_funcs: one function or several, as TRL calls them; None or NaN for a row takes no part in its reward.
        args: the settings, which must be a `RookWorldGRPOConfig`.
        train_dataset: rows with a column `prompt`; the reward functions get the other columns.
        eval_dataset: held-out rows, measured every `args.eval_steps`; see `watch_with`.
        processing_class: the tokenizer, with pad and end token; by default the one saved with the model.
        find_points: finds what the exact objectives sum over; see `rookworld_trl.training.exact.FindPoints`.
        plugins: what the run does besides; see `rookworld_trl.training.plugin`. Those that are off are left out.
        kwargs: further arguments of TRL's trainer; tools, environments and rollout functions are refused.

    Raises:
        TypeError, ValueError: see `rookworld_trl.training.preparation`; an impossible backend; the exact gradient
            without decision points, or the sampled one with them.
        GateError: during `train()`, when the first batch's numbers are wrong.
    """

    args: RookWorldGRPOConfig
    beta: float

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: RookWorldGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        find_points: FindPoints | None = None,
        plugins: Sequence[Plugin] = (),
        **kwargs: Any,
    ):
        args = prepare(args, model, processing_class, kwargs)
        check_plugins(args, plugins)
        self.plugins = [plugin for plugin in plugins if plugin.on]
        with weights_on_disk(model, args, kwargs.get("peft_config"), processing_class), trl_built_here():
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        check_built(self.model, self.ref_model, self.processing_class)
        if (args.objective == "sampled") != (find_points is None):
            raise ValueError(
                f"`objective` is {args.objective!r}: exact and mixed need the argument `find_points`, sampled does not "
                "use it. Give both or neither"
            )
        self._recipe = settings_of(plugins)
        self._build(find_points)

    def _build(self, find_points: FindPoints | None) -> None:
        """The objects that a step calls, each after those it needs; only plug-ins get the trainer."""
        args, accelerator, policy, tokenizer = self.args, self.accelerator, self.model, self.processing_class
        generation_config = getattr(self, "generation_config", None)  # vLLM has its own
        self.sampler = Sampler(args, accelerator, policy, tokenizer, self.eos_token_ids, generation_config)
        ref_device = placement.arrange(args, accelerator, self.ref_model, self.sharded)
        stock = super()._get_per_token_logps_and_entropies
        self.scorer = Scorer(args, accelerator, policy, self.ref_model, ref_device, stock)
        self.exact: ExactObjective | None = None
        if find_points is not None:
            seams = (find_points, tokenizer.decode, self.record)
            self.exact = ExactObjective(args, accelerator, policy, self.scorer, *seams)
        self.kl = KLPenalty(args, accelerator)
        self.gates = gates.FirstBatch(args, accelerator, policy, self._get_per_token_logps_and_entropies)
        # What learns from a step's numbers: if the step is undone, it goes back with the weights.
        learning: dict[str, Stateful] = {"kl_controller": self.kl.controller}
        self.controls |= learning
        for plugin in self.plugins:
            plugin.attach(self)
            state: dict[str, Stateful] = {plugin.STATE or plugin.NAME: plugin}
            learning |= state if plugin.UNDONE else {}
            self.controls |= state if plugin.keeps_state else {}
        self.guard: Guard | None = None
        if args.recovery and self.sharded:
            logger.warning("`recovery` is off: it keeps whole states in memory, and these weights are sharded")
        elif args.recovery:
            self.guard = self.controls["recovery"] = Guard(self, learning)
        for callback in filter(None, (*self.plugins, self.guard)):  # it keeps what they have made of a step
            self.add_callback(callback)
        self._drawn: Samples | None = None  # what a plug-in has sampled for the present batch
        self._temperatures: torch.Tensor | None = None  # (B,) of the present batch's rows; None: `args.temperature`
        self._rewards = torch.zeros(0)  # (N,) of the present batch, all processes'

    # For plug-ins

    @property
    def step_kl(self) -> tuple[float, torch.Tensor] | None:
        """At the end of an optimizer step, its mean KL (nats a token) and |log-ratio| of each completion of all
        processes (N,), nats; None where there is no KL, or the step has been undone."""
        event = None if self.guard is None else self.guard.event
        return self.kl.last if event is None or event["back_to_step"] is None else None

    def sample_rows(self, rows: list[Row]) -> Samples:
        """Completions for rows that TRL has not asked for yet."""
        prompt_ids, images, fields = self._tokenize_prompts([row["prompt"] for row in rows])
        self.sampler.take(rows)
        return self._draw(prompt_ids, images, fields, self.num_generations)

    def reward_of(self, rows: list[Row], drawn: Samples) -> np.ndarray:
        """Rewards (N,) of the global batch as it stands, without a trace in TRL's logs."""
        per_function = self._screened(rows, drawn.completion_ids)
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        return combine_rewards(per_function, self.reward_weights).double().cpu().numpy()

    def mine(self, rows: list[Row]) -> slice:
        """This process's part of what is gathered from all."""
        start = self.accelerator.process_index * len(rows)
        return slice(start, start + len(rows))

    def tasks(self, rows: list[Row]) -> list[str]:
        return [task_of(row) for row in rows]

    def record(self, name: str, value: float) -> None:
        """Log a number of the training step."""
        self._metrics["train"][name].append(value)

    @property
    def _mode(self) -> str:
        """The key of TRL's metrics: it tells training from evaluation by the model's mode."""
        return "train" if self.model.training else "eval"

    # A step begins: completions for a generation batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Once TRL has dealt a new generation batch to its micro-batches, bring the rows of each group together."""
        dealt = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.scorer.shared or self._buffered_inputs is dealt or self._buffered_inputs is None:
            return inputs
        self._buffered_inputs = scoring.regroup(self._buffered_inputs, self.args)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[Row]) -> Row:
        """Prompts chosen, sampled, scored, rewarded and compared; plug-ins change `inputs` in place."""
        training = self.model.training
        if self.guard:
            self.guard.check_weights()
        drawn = [plugin.rows(inputs) for plugin in self.plugins if training]
        temperatures = self._temperatures = self.sampler.take(inputs)
        self._drawn = next((samples for samples in drawn if samples is not None), None)
        batch = super()._generate_and_score_completions(inputs)
        batch |= {} if temperatures is None else {"temperatures": temperatures}
        if training:
            if self.gates.pending:
                self._pass_gates(batch)
            if self.exact:
                self.exact.prepare(inputs, batch, self._rewards[self.mine(inputs)].tolist())
            for plugin in self.plugins:
                plugin.sampled(inputs, batch)
            self._show_advantages(batch)
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **options: Any) -> Any:
        """One completion for each prompt (TRL has repeated them already): new ones, or what a plug-in has sampled."""
        samples = self._drawn
        if samples is None:
            samples = self._draw(prompt_ids, *others, **options)
        elif prompt_ids != samples.prompt_ids:
            raise RuntimeError("the batch's prompts are not those that were sampled")
        self.gates.sampled = samples
        return samples.completion_ids, None if None in samples.logps else samples.logps

    def _draw(self, prompt_ids: list[list[int]], *others: Any, **options: Any) -> Samples:
        """New completions."""
        single_turn = super()._generate_single_turn
        watched: Any = self.guard.sampling() if self.guard else nullcontext([])
        started = time.perf_counter()
        with watched as drawn:
            samples = self.sampler.sample(
                prompt_ids,
                lambda prompts: single_turn(prompts, *others, **options),
                record=self.gates.pending and self.model.training,
            )
            drawn.append(samples)
        seconds = self._ended("sampling", started)
        self._metrics[self._mode]["rollout/seconds_per_sample"].append(seconds / len(prompt_ids))
        samples.end_empty(self.eos_token_ids[0])
        return samples

    def _ended(self, phase: str, started: float) -> float:
        """Seconds of a phase of the step, which plug-ins hear of."""
        seconds = time.perf_counter() - started
        for plugin in self.plugins:
            plugin.ended(phase, seconds)
        return seconds

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.scorer(model, *args, **{"temperatures": self._temperatures, **kwargs})

    def _calculate_rewards(
        self, inputs: list[Row], prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """Rewards (N, functions) of all processes, NaN where a function gave no usable number."""
        per_function = self._screened(inputs, completion_ids_list)
        training, metrics, tasks = self.model.training, self._metrics[self._mode], self.tasks(inputs)
        rewards = self._rewards = combine_rewards(per_function, self.reward_weights)
        if training and bool(rewards.isnan().all()):
            if self.guard is None:
                raise Diverged(self.state.global_step + 1, "rewards of all completions not finite", NO_REWARDS)
            self.guard.faults.add("rewards")
        for plugin in self.plugins if training else ():
            plugin.rewarded(inputs, rewards)
        generations = self.num_generations if training else self.num_generations_eval
        teaches, names = informative_groups(rewards.cpu().numpy(), generations), np.array(ranks.everyones(tasks))
        metrics["groups/informative"].append(teaches.mean(dtype=np.float32).item())
        for task in sorted(set(names.tolist()) - {""}):
            own = names == task
            metrics[f"reward/{task}"].append(rewards[torch.from_numpy(own).to(rewards.device)].nanmean().item())
            metrics[f"groups/informative/{task}"].append(teaches[own[::generations]].mean(dtype=np.float32).item())
        self._log_completion_extra("task", tasks)
        return per_function

    def _screened(self, inputs: list[Row], completion_ids: list[list[int]]) -> torch.Tensor:
        """Rewards (N, functions) by texts that hide nothing: TRL's leave special tokens out and don't say whether they
        ended.

        Raises:
            Exception: what a reward function raised, in its own process; the others raise a RuntimeError with its
                traceback at the same time.
        """
        started, error, prompts = time.perf_counter(), None, [row["prompt"] for row in inputs]
        texts: list[Any] = completion_texts(self.processing_class, completion_ids, self.eos_token_ids)
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):  # a conversation, which the completion continues
                texts[number] = [{"role": "assistant", "content": texts[number]}]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, texts, completion_ids)
        except Exception as raised:  # TRL gathers the rewards at its end: there the others are waiting
            blank = torch.full((len(inputs), len(self.reward_funcs)), torch.nan, device=self.accelerator.device)
            error, rewards = raised, self.accelerator.gather(blank)
        ranks.fail_together(error, "a reward function")
        rewards, counts = screened(rewards, self.args.reward_limit)
        self._ended("rewards", started)
        for name, count in counts.items():
            self._metrics[self._mode][f"rewards/{name}"].append(count)
        return rewards

    def _pass_gates(self, batch: Row) -> None:
        """Measure the gates on the first batch, and go on only if they hold."""
        results = self.gates.measure(batch, self.state.global_step)
        for result in results:
            self.record(f"gates/{result.gate}", result.measured)
        gates.enforce(results)
        self.gates.pending = False

    def _show_advantages(self, batch: Row) -> None:
        """What the loss takes, for the table of completions: means over tokens; NaN where points take their place."""
        used, mask = batch["advantages"], batch["completion_mask"]
        if used.ndim == 2:
            used = (used * mask).sum(1) / mask.sum(1).clamp(min=1)
        if "by_samples" in batch:
            used = used.masked_fill(~batch["by_samples"], torch.nan)
        self._logs["advantages"].extend(ranks.everyones(used.tolist()))  # pushes out TRL's, which are as many

    # The loss and the update

    def _compute_loss(self, model: nn.Module, inputs: Row) -> torch.Tensor:
        """The loss of a micro-batch: what the samples and the decision points say, plus the KL penalty."""
        training, metrics = self.model.training, self._metrics[self._mode]
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.exact is not None:
            scored = self.exact(model, inputs)
        else:
            scored = self.scorer.of_batch(model, inputs, self.aux_loss_enabled)
        scale = Scale.of_batch(self.args, inputs, self.accelerator.num_processes, training, accumulation)
        total, measured = loss.compute(scored, inputs, self.args, scale, self.accelerator)
        for name, value in measured.items():
            metrics[name].append(value)
        if self.beta:
            total = total + self.kl(scored.logps, inputs, scale)
            if self.accelerator.sync_gradients:
                self.kl.finish_step(metrics, training)
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; if the guard skips the step, there is no gradient afterwards."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.guard:
            self.guard.check_gradient(model, norm)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing broken is saved or evaluated; what is found here has the coming step skipped."""
        if self.guard and (self.control.should_save or self.control.should_evaluate):
            self.guard.check_weights()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # The run

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.recovery_mode:
            self.kl.controller.beta *= RECOVERY_BETA


def combine_rewards(per_function: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum (N,) of the rewards (N, F) that apply; NaN where none does."""
    total = (per_function * weights.to(per_function.device)).nansum(dim=1)
    return total.masked_fill(per_function.isnan().all(dim=1), torch.nan)


def screened(rewards: torch.Tensor, limit: float) -> tuple[torch.Tensor, dict[str, int]]:
    """Rewards (N, functions) within +-limit, NaN where a function gave no finite number.

    One infinite reward would make its group's mean infinite and, with `scale_rewards="none"`, its advantages as large
    as float32 goes.

    Returns:
        Also the counts of completions without any finite reward, and of rewards that were cut, where there are some.
    """
    large = rewards.isfinite() & (rewards.abs() > limit)
    rewards = torch.where(rewards.isinf(), torch.nan, torch.where(large, limit * rewards.sign(), rewards))
    counts = {"not_finite": int(rewards.isnan().all(dim=1).sum()), "clamped": int(large.sum())}
    if any(counts.values()):
        logger.warning(
            f"rewards: {counts['not_finite']} of {len(rewards)} completions have no finite one and are left out, "
            f"{counts['clamped']} are cut to +-{limit:g} (`reward_limit`). Fix the reward function"
        )
    return rewards, {name: count for name, count in counts.items() if count}


def informative_groups(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Which groups (N / samples,) hold different rewards (N,), NaN left out; the others teach a group mean nothing."""
    groups = rewards.reshape(-1, samples)
    highest = np.where(np.isnan(groups), -np.inf, groups).max(axis=1)
    lowest = np.where(np.isnan(groups), np.inf, groups).min(axis=1)
    return highest - lowest > 1e-6
