"""Arguments of the GRPO trainer: TRL's, with defaults set on purpose and contradictions refused."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from rookworld_trl.settings.parser import option
from rookworld_trl.training import clashes, validation
from rookworld_trl.training.monitor import DEFAULT_BANDS
from rookworld_trl.training.placement import agree_on_tf32, follow_launcher, insist_on_no_compile, on_gpu

KL_STOP = 50.0  # nats a completion
COMPILE_BUCKET = 64  # tokens; prompts and completions of compiled models are padded to multiples of it


@dataclass
class RookWorldGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with some other defaults and with fields of its own, each explained in docs/recipes.md.

    The first fields are TRL's; why their defaults differ stands beside them in the source. Weights are always kept in
    float32 and dropout is always off; neither is an option, because the loss is wrong otherwise.

    Raises:
        ValueError: one message naming the field, its value, the contradiction and the remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "health_bands", "task_sampling"]

    CHOICES: ClassVar[dict[str, tuple[Any, ...]]] = validation.CHOICES

    # TRL keeps GPT-2's dropout of 0.1 in training: the same tokens under the same weights then score differently in
    # sampling, reference and loss, which looks like KL and is noise.
    disable_dropout: bool = option(True, "Always True: dropout makes log-probs under equal weights differ.")
    # TRL's 0 builds no reference model at all, so drift could be neither seen nor held.
    beta: float = option(0.01, "KL coefficient; 0 trains without a reference model and without KL.")
    # Chess rewards are graded, not 0/1: dividing by each group's own deviation would blow up groups that differ by
    # one near-miss. One deviation for the batch keeps the groups' relative sizes.
    scale_rewards: str = option("batch", "Divide advantages by the deviation of the `batch`, the `group`, or `none`.")
    # TRL's is `num_generations`, of which `per_device_eval_batch_size` would have to be a multiple.
    num_generations_eval: int | None = option(
        1, "Completions a prompt in TRL's own evaluation, where no group is compared."
    )
    # Each token of the accumulated batch weighs the same, however rows fall into micro-batches.
    loss_type: str = option("dapo", "Loss normalisation; see TRL's GRPOConfig.")
    # Clip-higher of DAPO (arXiv 2503.14476): rare good tokens may grow faster than common ones may shrink.
    epsilon_high: float | None = option(0.28, "Upper clip of the probability ratio.")
    # What is sampled is what is scored: no truncation, no reshaping, no temperature.
    temperature: float = option(1.0, "Sampling temperature; the loss uses the same.")
    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    # TRL's default is True under this old name, of which transformers warns. These models are small: recomputing
    # activations costs a third of the step and saves memory nobody needs.
    gradient_checkpointing: bool | None = option(
        None, "Old name of `activation_checkpointing`, which is off by default."
    )
    # TRL turns bf16 on wherever fp16 is off, CPU included, where autocast is slower and the gates looser.
    bf16: bool | None = option(None, "bf16 autocast over float32 weights; default: on a GPU that has it, else off.")
    logging_steps: float = option(1, "Log every so many optimizer steps.")
    # `every_save` would publish each checkpoint on the way.
    hub_strategy: str = option("end", "What is pushed when; see transformers.")
    # The filter replaces a NaN loss by 0 in the log, which hides the moment a run breaks.
    logging_nan_inf_filter: bool = option(False, "Hide NaN and Inf losses from the log.")
    # Completions go to Parquet files; the terminal is for the steps.
    num_completions_to_print: int | None = option(
        0, "Completions to print at each log, with `log_completions`; default: none."
    )
    # Batches are lists of Python rows: there is nothing to pin.
    dataloader_pin_memory: bool = option(False, "Always False: there is nothing to pin.")

    rollout_backend: str = option(
        "auto",
        "Who samples: `native` (this package's GPT-2 decoding; each prompt is prefilled once per group), "
        "`transformers` (generate), `vllm` (the same as `use_vllm`; see `vllm_mode`), or `auto`: native for GPT-2 "
        "without adapters, else transformers.",
    )
    share_prefixes: bool = option(
        True,
        "Score each distinct prefix of a micro-batch once, forward and backward, where that is possible: GPT-2 "
        "without adapters, in one process, without gradient checkpointing or the exact KL estimator.",
    )

    objective: str = option(
        "sampled",
        "`sampled`: GRPO. `exact`: the expected reward is summed over the actions of each decision point that the "
        "trainer's `find_points` knows (docs/exact-gradient.md). `mixed`: and the rest is sampled.",
    )

    # Sampling by task. Rows name their task in `task_column`.
    task_sampling: dict[str, Any] | str | None = option(
        None,
        "Settings of single tasks in place of `temperature` and `max_completion_length`, for example {environment: "
        "{temperature: 0.7, max_completion_length: 80}}. The loss scores each row at its temperature.",
    )
    target_task: str = option(
        "environment", "Task whose prompts have one right completion, the text in `target_column`."
    )
    draft_rollouts: bool = option(
        True, "Native rollouts of `target_task` draft the right completion: the same samples in fewer passes."
    )

    # Prompt mining; what it does is in `rookworld_trl.training.mining`.
    mining: bool = option(False, "Sample other prompts of the same task where all rewards of a group agree.")
    mining_ordinary: float = option(0.2, "Share of each task's prompts in a batch that are trained on as they come.")
    mining_rounds: int = option(1, "How often groups that agree are sampled again from other prompts, at most.")

    # Adapters (LoRA, arXiv 2106.09685, by peft): the base stays frozen and is the reference.
    use_peft: bool = option(False, "Train low-rank adapters instead of the model's weights.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Their output is scaled by lora_alpha / lora_r.")
    lora_target_modules: list[str] | None = option(
        None, "Names of the layers that get adapters; default: every linear layer."
    )

    # Advantages; definitions and sources in `rookworld_trl.training.advantages`.
    advantage_baseline: str = option(
        "group_mean", "What a reward is compared with: group_mean, leave_one_out, ema, or adaptive."
    )
    task_column: str = option("task", "Column that names a row's task; averages are kept for each of its values.")
    use_gae: bool = option(False, "Per-token advantages by GAE, from a small value head of its own.")
    gae_gamma: float = option(1.0, "Discount of GAE, per token.")
    gae_lambda: float = option(0.95, "Lambda of GAE.")

    # Recovery from NaN and Inf, and rewards that are none; see `rookworld_trl.training.recovery`.
    recovery: bool = option(True, "Skip steps with NaN or Inf, go back to the last good state and go on.")
    recovery_max_attempts: int = option(
        3, "Faults in a row, over restarts too, that are recovered from; the next ends the run."
    )
    recovery_snapshot_steps: int = option(5, "Optimizer steps between copies of the state (two are held in memory).")
    reward_limit: float = option(1e4, "Rewards beyond +-reward_limit are cut to it; NaN and Inf are left out.")

    # Learning rate.
    lr_schedule: str = option(
        "transformers", "transformers: `lr_scheduler_type` rules; advanced: warm-up, cosine to `lr_floor`, linear to 0."
    )
    lr_control: str = option(
        "fixed",
        "fixed, or kl: half the learning rate, to a tenth of its schedule at most, each time the KL is above "
        "`kl_target` x `kl_factor` for `kl_interval` steps in a row, and a tenth more when it is not.",
    )
    lr_floor: float = option(0.1, "Where the advanced cosine ends, as a share of the peak.")
    lr_decay_steps: float = option(0.1, "Steps of the advanced schedule's last decay; below 1: a share of the run.")

    # Monitoring; see `rookworld_trl.training.monitor` and `throughput`.
    health_bands: dict[str, Any] | str | None = option(
        None,
        "Changes to the health bands, by metric or pattern: a pair [yellow, red], or null for no band; yellow above "
        "red means that smaller is worse.",
    )
    health_patience: int = option(3, "Logs in a row that must agree before a metric changes its colour.")
    target_column: str = option("target", "Column that holds the right completion's text.")
    target_rows: int = option(32, "Rows whose truth's log-prob is followed; 0: none.")
    target_every: int = option(10, "Optimizer steps between two looks at it.")
    peak_tflops: float | None = option(None, "Peak of one device, for MFU; by default known for common GPUs only.")

    # Checkpoints and restarts; see `rookworld_trl.checkpointing.store` and `resume`.
    auto_resume: bool = option(
        False, "Go on from the newest checkpoint in `output_dir` that verifies; a finished run is a no-op."
    )
    recovery_mode: bool = option(
        False,
        "Go on from the newest stable checkpoint at half the learning rate and twice the KL penalty; give it once, "
        "after a run has diverged, and `auto_resume` from then on.",
    )
    stable_after_steps: int = option(
        10, "Healthy optimizer steps that must follow a checkpoint to make it stable; 0: never."
    )

    # KL to the reference; formulas, biases and sources in `rookworld_trl.training.kl`.
    kl_type: str = option(
        "policy_to_reference",
        "policy_to_reference KL(pi||ref), reference_to_policy KL(ref||pi), or symmetric, half of each.",
    )
    kl_estimator: str = option("k3", "k1, k2, k3, or exact (over the whole vocabulary).")
    # transformers' False would contradict accelerate's own setting, which acts without being asked.
    torch_compile: bool | None = option(
        None, "Compile the model; default: as `accelerate launch` says (`dynamo_config`)."
    )
    kl_control: str = option("fixed", "What moves beta: fixed, multiplicative, or proportional (Ziegler et al.).")
    kl_target: float = option(0.03, "KL that the control aims at, nats a token.")
    kl_factor: float = option(1.5, "Step and dead band of the multiplicative control.")
    kl_interval: int = option(10, "Optimizer steps between multiplicative judgements.")
    beta_min: float = option(1e-4, "Lower bound of a controlled beta.")
    beta_max: float = option(1.0, "Upper bound of a controlled beta.")
    kl_warmup_steps: int = option(0, "Optimizer steps over which beta ramps up from 0.")
    kl_stop_threshold: float | None = option(
        None,
        "Stop, with a checkpoint, when mean or 95th percentile of the completions' |KL| (nats a completion) exceeds "
        "this; 0: never. Default: 50, and 0 where `beta` is 0 and there is no KL.",
    )
    reference_reset_steps: int = option(0, "Make the policy the new reference every so many optimizer steps; 0: never.")
    reference_reset_stall: int = option(0, "Do so when the KL has stood still over so many optimizer steps; 0: never.")

    # Devices; see `rookworld_trl.training.placement`.
    ref_device: str = option(
        "auto", "The reference's device: auto (a second GPU of this process, if any), cpu, cuda:1, ..."
    )
    attn_implementation: str = option(
        "sdpa",
        "Attention of transformers' forward pass, by which models train that do not share prefixes: sdpa, eager, "
        "flash_attention_2. Shared prefixes have attention of their own, which is fused where that pays.",
    )
    auto_batch_size: bool = option(
        False, "On a GPU, measure memory and choose the micro-batch; the batch of an update stays as it is."
    )
    memory_share: float = option(0.85, "Share of the GPU that auto_batch_size may fill.")

    def __post_init__(self) -> None:
        follow_launcher(self)
        self.choose_precision()
        if self.rollout_backend == "vllm":
            self.use_vllm = True
        validation.check_fields(self)
        clashes.check_batches(self)
        super().__post_init__()
        if self.kl_stop_threshold is None:
            self.kl_stop_threshold = KL_STOP if self.beta else 0.0
        clashes.check(self)
        self.settle_devices()

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
        """Fill in what follows from the fields about devices, and check them."""
        config: Any = self
        insist_on_no_compile(config)
        if on_gpu(config):
            agree_on_tf32(config)
        if config.n_gpu > 1:
            config._n_gpu = 1  # read by transformers where it would wrap the policy in DataParallel
        if config.torch_compile and config.pad_to_multiple_of is None:
            config.pad_to_multiple_of = COMPILE_BUCKET
        clashes.check_devices(config)

    def bands(self) -> dict[str, tuple[float, float]]:
        """The health bands in force: the defaults with `health_bands` laid over them, its own first."""
        changes = dict(self.health_bands) if isinstance(self.health_bands, dict) else {}
        merged = {**changes, **{name: band for name, band in DEFAULT_BANDS.items() if name not in changes}}
        return {name: (float(band[0]), float(band[1])) for name, band in merged.items() if band is not None}
