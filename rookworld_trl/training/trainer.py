"""GRPO on TRL's trainer, with the numbers checked: every change goes through `super()` at a seam of TRL's.

In layers, each with one idea: `KLTrainer` (the loss), `RolloutTrainer` (sampling and the gates), `RewardTrainer`
(screened rewards), `MiningTrainer` (which prompts), `RecoveryTrainer` (NaN and Inf), `CheckpointTrainer` (saving and
resuming) and the trainer itself (set-up, advantages, monitors).
`tests/training/test_trl_seams.py` pins each of those seams, so that an upgrade of TRL fails there, by name.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from rookworld_trl.checkpointing.lock import check_output_dir
from rookworld_trl.checkpointing.state import Stateful
from rookworld_trl.modeling.hub import check_write, explained, hide_token
from rookworld_trl.modeling.positions import install_position_hook
from rookworld_trl.training.advantages import Baseline, combine_rewards, scale_advantages, useful_share
from rookworld_trl.training.checkpoint_trainer import CheckpointTrainer
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.micro_batch import fit_to_gpu
from rookworld_trl.training.monitor import HealthMonitor, TruthProbe, truth_rows
from rookworld_trl.training.preparation import (
    check_tokenizer,
    check_vllm_installed,
    check_weights,
    float32_head,
    lora_config,
    weights_on_disk,
    widen_to_float32,
)
from rookworld_trl.training.schedules import advanced_scheduler
from rookworld_trl.training.throughput import Throughput, peak_flops
from rookworld_trl.training.value import ValueHead


class RookWorldGRPOTrainer(CheckpointTrainer):
    """TRL's `GRPOTrainer`, made right for left-padded GPT-2 and refusing to train on wrong numbers.

    * position ids follow the attention mask, in policy and reference;
    * dropout is off in both, weights that train are float32;
    * a model passed as an object gets a reference with its own starting weights, not those its name points to;
    * completions come from `args.rollout_backend`, with the log-probs they were sampled at;
    * the first batch passes the gates of `rookworld_trl.training.gates`, or `GateError` is raised before any update;
    * the KL penalty has a direction, an estimator and a controlled coefficient (`rookworld_trl.training.kl`);
    * advantages come from the baseline of `args.advantage_baseline`, or token by token from a value head (GAE).

    Takes TRL's arguments; `args` must be a `RookWorldGRPOConfig`.

    Raises:
        TypeError: `args` of another class.
        ValueError: an output folder that cannot be written, a tokenizer without pad or eos token, weights that are not
            float32, an impossible backend.
        GateError: during `train()`, when the first batch's numbers are wrong.
    """

    args: RookWorldGRPOConfig
    lr_scheduler: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: RookWorldGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, RookWorldGRPOConfig):
            raise TypeError(f"`args` must be a RookWorldGRPOConfig, got {type(args).__name__}")
        if args.should_save:
            check_output_dir(args.output_dir)
        hide_token(args)
        check_tokenizer(processing_class)
        check_vllm_installed(args)
        if isinstance(model, nn.Module):
            widen_to_float32(model)
        if args.use_peft and kwargs.get("peft_config") is None:
            kwargs["peft_config"] = lora_config(args, model)
        fit_to_gpu(args, model, train_dataset, processing_class)
        adapter = kwargs.get("peft_config") is not None
        with weights_on_disk(model, args, adapter, processing_class), float32_head():
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        check_tokenizer(self.processing_class)
        for each in (self.model, self.ref_model):
            if each is not None:
                install_position_hook(each)
                check_weights(each)
        self.baseline = Baseline(args.advantage_baseline, args.baseline_decay)
        self.value_head: ValueHead | None = None
        if args.use_gae:
            width = self.model.config.hidden_size
            options = (args.value_hidden_size, args.value_learning_rate, args.value_epochs, args.seed)
            self.value_head = ValueHead(width, *options, device=self.accelerator.device)
        self._add_monitors()

    def _add_monitors(self) -> None:
        """Throughput, the truth's log-prob and health bands; they record into the same metrics as TRL."""

        def record(name: str, value: float) -> None:
            self._metrics["train"][name].append(value)

        args = self.args
        peak = args.peak_tflops * 1e12 if args.peak_tflops else None
        if peak is None and torch.cuda.is_available() and not args.use_cpu:
            peak = peak_flops(torch.cuda.get_device_name(), mixed=self.accelerator.mixed_precision != "no")
        self.throughput = Throughput(self.model.config, record, peak, self.share_prefixes)
        context = getattr(self.model.config, "max_position_embeddings", None)
        rows = truth_rows(self.train_dataset, self.processing_class, args.truth_column, args.truth_rows, context)
        self.truth_probe = TruthProbe(rows, self.processing_class.pad_token_id, record, args.truth_every)
        self.health = HealthMonitor(args.bands(), Path(args.output_dir), args.health_patience)
        for callback in (self.throughput, self.truth_probe, self.health):
            self.add_callback(callback)

    # Advantages

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A new generation batch, with the advantages of the baseline or value head in place of TRL's."""
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.throughput.sampled(batch, self.num_generations, batch.pop("drafted", None))
            if self.value_head is not None or self.baseline.kind != "group_mean":
                batch["advantages"] = self._advantages(inputs, batch)
        return batch

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the rewards (N, functions) of all processes for the baselines, and log them by task."""
        self._rewards: torch.Tensor = super()._calculate_rewards(inputs, *args, **kwargs)
        generations = self.num_generations if self.model.training else self.num_generations_eval
        rewards = combine_rewards(self._rewards, self.reward_weights.to(self._rewards.device))
        metrics = self._metrics[self._mode]
        metrics["groups/useful"].append(useful_share(rewards, generations))
        tasks = [str(row.get(self.args.task_column, "")) for row in inputs]
        self._log_completion_extra("task", tasks)
        everyones = gather_object(tasks)
        for task in sorted(set(everyones) - {""}):
            own = rewards[torch.tensor([name == task for name in everyones], device=rewards.device)]
            metrics[f"reward/{task}"].append(own.nanmean().item())
            metrics[f"groups/useful/{task}"].append(useful_share(own, generations))
        return self._rewards

    def _advantages(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> torch.Tensor:
        """This process's advantages in place of TRL's: (B,) by a baseline, or (B, C) by GAE."""
        rewards = combine_rewards(self._rewards, self.reward_weights.to(self._rewards.device))
        start = self.accelerator.process_index * len(inputs)
        mine = slice(start, start + len(inputs))
        if self.value_head is not None:
            mask = batch["completion_mask"] * batch.get("tool_mask", 1)
            with torch.no_grad():
                states = self._hidden_states(self.model, batch)
            options = (self.args.gae_gamma, self.args.gae_lambda, self.args.scale_rewards == "batch", self.accelerator)
            advantages, error = self.value_head.advantages(states, rewards[mine], mask, *options)
            self._metrics["train"]["value/error"].append(error)
            return advantages
        tasks = gather_object([str(row.get(self.args.task_column, "")) for row in inputs])
        advantages = rewards - self.baseline(rewards, self.num_generations, tasks)
        advantages = scale_advantages(advantages, rewards, self.num_generations, self.args.scale_rewards)
        self._logs["advantages"].extend(advantages.tolist())  # pushes out TRL's, which are as many
        return advantages[mine]

    # Schedule and checkpoints

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if self.lr_scheduler is None and self.args.lr_schedule == "advanced":
            self.lr_scheduler = advanced_scheduler(
                optimizer or self.optimizer,
                num_training_steps,
                self.args.get_warmup_steps(num_training_steps),
                self.args.lr_decay_steps,
                self.args.lr_floor,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # The trained model

    def merged_model(self) -> PreTrainedModel:
        """The policy as a plain model: itself or, where adapters train, a copy of the base with them merged into it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "merge_and_unload"):
            return model
        merged = copy.deepcopy(model).merge_and_unload()
        merged.__dict__.pop("forward", None)  # TRL's, which is bound to the original
        return merged

    def save_merged(self, folder: str | Path) -> None:
        """Save the policy and its tokenizer so that they load without peft. Nothing is pushed."""
        if not hasattr(self.accelerator.unwrap_model(self.model), "merge_and_unload"):
            self.save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            self.merged_model().save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    @property
    def stop_reason(self) -> str:
        """Why training stopped before its last step; empty if it did not."""
        return self.kl_stop.reason

    def _controls(self) -> dict[str, Stateful]:
        return {
            **super()._controls(),
            "baseline": self.baseline,
            "truth_probe": self.truth_probe,
            "health": self.health,
            **({} if self.miner is None else {"miner": self.miner}),
        }

    def _save_own_state(self, folder: Path, *args: Any) -> None:
        super()._save_own_state(folder, *args)
        if self.value_head is not None and self.args.should_save:
            self.value_head.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.value_head is not None:
            self.value_head.load(Path(checkpoint))

    # Hub

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository, with errors that say what to do."""
        with explained(self.args.hub_model_id or Path(self.args.output_dir).name, "nothing has been trained yet"):
            super().init_hf_repo(*args, **kwargs)
            check_write(self.hub_model_id, self.args.hub_token)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None from TRL, whose example talks to a chat model: the run writes its own, with what it measured."""
