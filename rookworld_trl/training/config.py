"""Arguments of the GRPO trainer: TRL's, with defaults set on purpose and contradictions refused."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from trl import GRPOConfig

from rookworld_trl.settings.parser import check_options, option, require
from rookworld_trl.training.placement import agree_on_tf32, cuda_graphs, follow_launcher, insist_on_no_compile, on_gpu

# `generation_kwargs` reach `generate` behind the loss's back; only those that cannot change what is sampled may pass.
_HARMLESS_GENERATION_KWARGS = {"use_cache", "cache_implementation", "prefill_chunk_size"}

SCORED = "the loss scores tokens under the untruncated distribution, so this one would be scored wrongly"
_WITHOUT_TRUNCATION: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

_DEVICE = re.compile(r"cpu|cuda:\d+")

NO_KL = "with `beta` 0 there is no reference model and no KL to act on. Set `beta` above 0, or leave this off"
COMPILE_BUCKET = 64  # tokens; prompts and completions of compiled models are padded to multiples of it


@dataclass
class RookWorldGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with some other defaults and with fields of its own, each explained in docs/recipes.md.

    The first fields are TRL's; why their defaults differ stands beside them in the source. Weights are always kept in
    float32 and dropout is always off; neither is an option, because the loss is wrong otherwise.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "task_sampling"]

    # TRL keeps GPT-2's dropout of 0.1 in training: the same tokens under the same weights then score differently in
    # sampling, reference and loss, which looks like KL and is noise.
    disable_dropout: bool = option(True, "Always True: dropout makes log-probs under equal weights differ.")
    # TRL's 0 builds no reference model at all, so drift could be neither seen nor held.
    beta: float = option(0.01, "KL coefficient; 0 trains without a reference model and without KL.", least=0)
    # Chess rewards are graded, not 0/1: dividing by each group's own deviation would blow up groups that differ by
    # one near-miss. One deviation for the batch keeps the groups' relative sizes.
    scale_rewards: Literal["batch", "group", "none"] = option(
        "batch", "Divide advantages by the deviation of the `batch`, the `group`, or `none`."
    )
    # TRL's is `num_generations`, of which `per_device_eval_batch_size` would have to be a multiple.
    num_generations_eval: int | None = option(
        1, "Completions a prompt in TRL's own evaluation, where no group is compared."
    )
    # TRL takes any word, and all but `sequence` for `token`.
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio of each token, or one of the whole completion (GSPO)."
    )
    # Each token of the accumulated batch weighs the same, however rows fall into micro-batches.
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = option("dapo", "Loss normalisation; see TRL's GRPOConfig.")
    # Clip-higher of DAPO (arXiv 2503.14476): rare good tokens may grow faster than common ones may shrink.
    epsilon_high: float | None = option(0.28, "Upper clip of the probability ratio.", above=0)
    # What is sampled is what is scored: no truncation, no reshaping, no temperature.
    temperature: float = option(1.0, "Sampling temperature; the loss uses the same.", above=0)
    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.", least=0)
    # TRL's default is True under this old name, of which transformers warns. These models are small: recomputing
    # activations costs a third of the step and saves memory nobody needs.
    gradient_checkpointing: bool | None = option(
        None, "Old name of `activation_checkpointing`, which is off by default."
    )
    # TRL turns bf16 on wherever fp16 is off, CPU included, where autocast is slower and the gates looser.
    bf16: bool | None = option(None, "bf16 autocast over float32 weights; default: on a GPU that has it, else off.")
    logging_steps: float = option(1, "Log every so many optimizer steps.")
    # transformers would upload the output folder, logs and arguments with it.
    hub_strategy: Literal["end"] = option("end", "Always `end`: the trained model is pushed once, with its card.")
    # The filter replaces a NaN loss by 0 in the log, which hides the moment a run breaks.
    logging_nan_inf_filter: bool = option(False, "Hide NaN and Inf losses from the log.")
    # Completions go to Parquet files; the terminal is for the steps.
    num_completions_to_print: int | None = option(
        0, "Completions to print at each log, with `log_completions`; default: none."
    )
    # Batches are lists of Python rows: there is nothing to pin.
    dataloader_pin_memory: bool = option(False, "Always False: there is nothing to pin.")

    rollout_backend: Literal["auto", "native", "transformers", "vllm"] = option(
        "auto",
        "Who samples: `native` (this package's GPT-2 decoding; each prompt is prefilled once per group), "
        "`transformers` (generate), `vllm` (the same as `use_vllm`; see `vllm_mode`), or `auto`: native for GPT-2 "
        "without adapters, else transformers.",
    )
    share_prefixes: bool = option(
        True,
        "Score each distinct prefix of a micro-batch once, forward and backward, where that is possible: GPT-2 "
        "without adapters, in one process, without gradient checkpointing.",
    )

    objective: Literal["sampled", "exact", "mixed"] = option(
        "sampled",
        "`sampled`: GRPO. `exact`: the expected reward is summed over the actions of each decision point that the "
        "trainer's `find_points` knows (docs/exact-gradient.md). `mixed`: and the rest is sampled.",
    )

    # Sampling by task, which rows name in the column `task`; averages are kept for each.
    task_sampling: dict[str, Any] | str | None = option(
        None,
        "Settings of single tasks in place of `temperature` and `max_completion_length`, for example {environment: "
        "{temperature: 0.7, max_completion_length: 80}}. The loss scores each row at its temperature.",
    )
    target_task: str = option(
        "environment",
        "Task whose prompts have one right completion, the text in the column `target`. Native rollouts draft it: the "
        "same samples in fewer passes.",
    )

    # Adapters (LoRA, arXiv 2106.09685, by peft): the base stays frozen and is the reference.
    use_peft: bool = option(False, "Train low-rank adapters instead of the model's weights.")
    lora_r: int = option(16, "Rank of the adapters.", least=1)
    lora_alpha: int = option(32, "Their output is scaled by lora_alpha / lora_r.", above=0)
    lora_target_modules: list[str] | None = option(
        None, "Names of the layers that get adapters; default: every linear layer."
    )

    # Recovery from NaN and Inf, and rewards that are none; see `rookworld_trl.training.recovery`.
    recovery: bool = option(True, "Skip steps with NaN or Inf, go back to the last good state and go on.")
    recovery_max_attempts: int = option(3, "Faults in a row that are recovered from; the next ends the run.", least=0)
    recovery_snapshot_steps: int = option(
        5, "Optimizer steps between copies of the state (two are held in memory).", least=1
    )
    reward_limit: float = option(1e4, "Rewards beyond +-reward_limit are cut to it; NaN and Inf are left out.", above=0)

    # Checkpoints and restarts; see `rookworld_trl.checkpointing.store` and `resume`.
    auto_resume: bool = option(
        False, "Go on from the newest checkpoint in `output_dir` that verifies; a finished run is a no-op."
    )
    recovery_mode: bool = option(
        False,
        "Go on from the newest checkpoint but one at half the learning rate and twice the KL penalty; give it once, "
        "after a run has diverged, and `auto_resume` from then on.",
    )

    # KL to the reference; formulas, biases and sources in `rookworld_trl.training.kl`.
    kl_type: Literal["policy_to_reference", "reference_to_policy", "symmetric"] = option(
        "policy_to_reference",
        "policy_to_reference KL(pi||ref), reference_to_policy KL(ref||pi), or symmetric, half of each.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "How the KL is estimated from a sampled token: k1, k2, k3.")
    # transformers' False would contradict accelerate's own setting, which acts without being asked.
    torch_compile: bool | None = option(
        None, "Compile the model; default: as `accelerate launch` says (`dynamo_config`)."
    )
    kl_control: Literal["fixed", "multiplicative"] = option("fixed", "What moves beta: fixed or multiplicative.")
    kl_target: float = option(0.03, "KL that the control aims at, nats a token.", above=0)
    kl_factor: float = option(1.5, "Step and dead band of the multiplicative control.", above=1)
    kl_interval: int = option(10, "Optimizer steps between multiplicative judgements.", least=1)
    beta_min: float = option(1e-4, "Lower bound of a controlled beta.", above=0)
    beta_max: float = option(1.0, "Upper bound of a controlled beta.", above=0)
    kl_warmup_steps: int = option(0, "Optimizer steps over which beta ramps up from 0.", least=0)
    # Devices; see `rookworld_trl.training.placement`.
    ref_device: str = option(
        "auto", "The reference's device: auto (a second GPU of this process, if any), cpu, cuda:1, ..."
    )

    def __post_init__(self) -> None:
        follow_launcher(self)
        self.choose_precision()
        if self.rollout_backend == "vllm":
            self.use_vllm = True
        if isinstance(self.scale_rewards, bool):  # TRL's old spelling
            self.scale_rewards = "group" if self.scale_rewards else "none"
        check_options(self)
        if self.load_best_model_at_end and self.metric_for_best_model is None:  # transformers would take the loss
            unknown = "nothing says which checkpoint is the best"
            require(False, "load_best_model_at_end", True, unknown, "set `metric_for_best_model`")
        super().__post_init__()
        self.settle_devices()
        for problem in contradictions(self):
            name, _, what = problem.partition(": ")
            raise ValueError(f"`{name}` is {getattr(self, name)!r}: {what}.")
        check_task_sampling(self)

    def choose_precision(self) -> None:
        """Fill in `bf16` and `tf32` where they are left open."""
        config: Any = self  # its fields are transformers'
        # Without emulation, which is slower than float32 and which a V100 or T4 has.
        native = on_gpu(config) and torch.cuda.is_bf16_supported(including_emulation=False)
        if config.bf16 is None:
            config.bf16 = native and not config.fp16
        if config.tf32 is None and native and config.bf16 and torch.version.hip is None:
            config.tf32 = True  # for the head, which stays float32 under autocast: 11 bits of its inputs, bf16 takes 8

    def settle_devices(self) -> None:
        """Fill in what follows from the fields about devices."""
        config: Any = self
        insist_on_no_compile(config)
        if on_gpu(config):
            agree_on_tf32(config)
        if config.n_gpu > 1:
            config._n_gpu = 1  # read by transformers where it would wrap the policy in DataParallel
        if config.torch_compile and config.pad_to_multiple_of is None:
            config.pad_to_multiple_of = COMPILE_BUCKET


def contradictions(c: RookWorldGRPOConfig) -> Iterator[str]:
    """What would be wrong with the numbers, or end a run halfway, and neither TRL nor transformers refuses.

    Lines of one form, "field: what is wrong with it. What to do".
    """
    yield from _sampling(c)
    yield from _whole_run(c)
    yield from _kl(c)
    if c.objective != "sampled":
        yield from _objective(c)
    yield from _devices(c)


def _sampling(c: RookWorldGRPOConfig) -> Iterator[str]:
    """Who samples, and that what is sampled is what is scored."""
    vllm = c.use_vllm
    for name, plain in _WITHOUT_TRUNCATION.items():
        if (getattr(c, name) or plain) != plain:
            yield f"{name}: {SCORED}. Set it to {plain}"
    if set(c.generation_kwargs or {}) - _HARMLESS_GENERATION_KWARGS:
        yield f"generation_kwargs: {SCORED}. Keep none but {', '.join(sorted(_HARMLESS_GENERATION_KWARGS))}"
    if c.use_transformers_continuous_batching:
        yield "use_transformers_continuous_batching: rows have settings of their own here. Leave it out"
    if vllm and c.rollout_backend not in ("auto", "vllm"):
        yield "rollout_backend: `use_vllm` chooses the sampler too. Unset it, or leave `rollout_backend` out"
    if vllm and c.vllm_mode == "colocate" and not (c.bf16 or c.fp16):
        yield (
            "vllm_mode: TRL starts that engine in the dtype of vLLM's choice, bfloat16, and the loss would be scored "
            "in float32. Set `bf16` to true, or use a server (`vllm_mode: server`) started with `--dtype float32`"
        )


def _whole_run(c: RookWorldGRPOConfig) -> Iterator[str]:
    """Runs that would learn nothing, or be of another length than was asked for, or could not go on."""
    if c.use_adaptive_entropy:
        yield "use_adaptive_entropy: the loss here has a constant coefficient. Set `entropy_coef`"
    if c.max_steps == 0:
        yield "max_steps: transformers would take `num_train_epochs` in its place. Set it to 1 or more, or leave it out"
    if str(getattr(c.save_strategy, "value", c.save_strategy)) == "best":
        yield (
            "save_strategy: a run that is interrupted between two best steps could not go on from where it was. Set it "
            "to steps; with `metric_for_best_model` the best checkpoint is kept too"
        )
    if c.save_only_model:
        yield (
            "save_only_model: a checkpoint without optimizer state cannot be resumed from. Leave it False; the trained "
            "model is saved by itself at the end"
        )


def _kl(c: RookWorldGRPOConfig) -> Iterator[str]:
    controlled = c.kl_control != "fixed"
    for name, wanted in (("kl_control", controlled), ("kl_warmup_steps", c.kl_warmup_steps)):
        if wanted and c.beta == 0:
            yield f"{name}: {NO_KL}"
    if controlled and not 0 < c.beta_min <= c.beta <= c.beta_max:
        yield (
            f"beta: a controlled beta must start within [beta_min, beta_max] = [{c.beta_min:g}, {c.beta_max:g}]. Widen "
            "the bounds or move beta"
        )
    if controlled and c.sync_ref_model:
        yield "sync_ref_model: a reference that follows the policy by itself defeats the KL control. Use a fixed beta"


def _objective(c: RookWorldGRPOConfig) -> Iterator[str]:
    """What the exact gradient leaves no room for."""
    off_policy = "a batch that is used more than once has prefixes of an older policy"
    rows, asked = c.per_device_train_batch_size * c.gradient_accumulation_steps, c.steps_per_generation
    no_room = {
        "num_iterations": (c.num_iterations > 1, f"{off_policy}. Set it to 1"),
        "steps_per_generation": (
            asked != c.gradient_accumulation_steps,
            f"{off_policy}. Leave it at `gradient_accumulation_steps`",
        ),
        "scale_rewards": (
            c.scale_rewards == "batch",
            "each decision point has a deviation of its own, in closed form. Set it to group or none",
        ),
        "top_entropy_quantile": (
            c.top_entropy_quantile < 1,
            "a decision is summed over whole actions, not token by token. Set it to 1.0; `entropy_coef` works",
        ),
        "num_generations": (
            c.objective == "mixed" and rows % c.num_generations,
            f"a process's {rows} completions a step are no whole number of groups. Choose a divisor of {rows}",
        ),
    }
    yield from (f"{name}: `objective` is {c.objective}, and {why}" for name, (found, why) in no_room.items() if found)


def _devices(c: RookWorldGRPOConfig) -> Iterator[str]:
    # CUDA graphs give their memory to the next call, and with it the gradients that are being summed up. Nor are
    # shapes fixed: on a GPU TRL's head takes the valid tokens of a batch only. So torch's default mode stands.
    if cuda_graphs(c) and c.gradient_accumulation_steps > 1:
        yield (
            "torch_compile_mode: its CUDA graphs overwrite gradients that are accumulated "
            f"(`gradient_accumulation_steps` is {c.gradient_accumulation_steps}). Leave it out, or set it to "
            "max-autotune-no-cudagraphs"
        )
    elsewhere = c.ref_device != "auto"
    if elsewhere and not _DEVICE.fullmatch(c.ref_device):
        yield "ref_device: no such device. Write auto, cpu, or cuda: and a number, such as cuda:1"
    if elsewhere and c.sync_ref_model:
        yield "ref_device: a reference that follows the policy (`sync_ref_model`) must sit beside it. Leave it at auto"
    if c.ref_device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "ref_device: every process would put its reference there. Write auto or cpu where several processes train"
    if c.tf32 and not c.bf16 and not c.fp16:
        yield (
            "tf32: the gates hold float32 log-probs to 1e-4, and TF32 keeps three digits. Set `bf16` to true as well, "
            "or leave `tf32` out"
        )


def check_task_sampling(config: GRPOConfig) -> None:
    by_task = config.task_sampling or {}
    mapping = isinstance(by_task, dict) and all(isinstance(own, dict) for own in by_task.values())
    remedy = "write it as {environment: {temperature: 0.7}}"
    require(mapping, "task_sampling", by_task, "settings stand by task", remedy)
    if by_task and config.use_vllm:
        problem = "vLLM takes one setting for all rows"
        require(False, "task_sampling", by_task, problem, "unset `use_vllm`, or leave it out")
    limit = config.max_completion_length or 0
    for task, own in dict(by_task).items():
        for name, value in own.items():
            right, problem, remedy = False, "no such setting", "use temperature or max_completion_length"
            if name == "temperature":
                right = isinstance(value, int | float) and value > 0
                problem, remedy = "sampling needs a positive temperature", "set it to something like 1.0"
            elif name == "max_completion_length":
                right = isinstance(value, int) and 1 <= value <= limit
                problem, remedy = "it lies outside 1 to `max_completion_length`", f"use at most {limit}"
            require(right, f"task_sampling[{task}].{name}", value, problem, remedy)
