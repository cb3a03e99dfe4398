"""The prompts of a GRPO run: those it trains on, in their order, and those it is measured on."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets
from trl import GRPOConfig

from rookworld_trl.config import option
from rookworld_trl.data.dataset import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.data.sources import DataOptions, check_lengths, load_prompts, without
from rookworld_trl.data.splits import draw_of_each


@dataclass
class PromptOptions(DataOptions):
    """Which prompts a run trains on, in which shares, and on which it is measured."""

    dataset: str = option(
        "shipped", "`shipped`, which comes with the package, a file (see docs/data.md), or `owner/name` on the Hub."
    )
    dataset_split: str = option("train", "Split of a data set on the Hub.")
    mix_env_ratio: float = option(0.2, "Share of `A:` prompts, exactly this in every batch.")
    policy_strata: dict[str, float] | None = option(
        None, "Exact shares of the `P:` prompts for what is rare, such as `{check: 0.25}`."
    )
    eval_split: Literal["dev", "test"] = option("test", "`dev` to choose settings, `test` to believe a result.")
    eval_policy_items: int | None = option(None, "Held-out `P:` items to measure, drawn at random; default: all.")
    eval_environment_items: int | None = option(None, "Held-out `A:` items to measure, drawn at random; default: all.")
    eval_batch_size: int = option(128, "Prompts decoded at a time in the evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_policy_items", "eval_environment_items", "eval_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}: nothing would be measured. Set it to 1 or more")


def training_prompts(run: PromptOptions, args: GRPOConfig) -> Dataset:
    """Prompts in the order they are trained on: every generation batch holds exactly `mix_env_ratio` of `A:`.

    Sets `args.max_steps` where the epochs decide it, and `args.shuffle_dataset`, for the order is made here.
    """
    dataset = load_shipped("train") if run.dataset == "shipped" else load_prompts(run.dataset, run.dataset_split, run)
    # All of both splits, whichever this run is measured on and however much of it.
    dataset, dropped = without(dataset, concatenate_datasets([load_shipped(split) for split in ("dev", "test")]))
    if dropped:
        print(f"dropped {dropped} training prompts whose positions are held out")
    prompts_per_batch = args.generation_batch_size // args.num_generations
    # A generation batch feeds `steps_per_generation` micro-batches, `num_iterations` times over.
    steps_per_batch = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(dataset) / prompts_per_batch * steps_per_batch)
    args.shuffle_dataset = False
    sizes = {"prompts_per_batch": prompts_per_batch, "batches": math.ceil(args.max_steps / steps_per_batch)}
    return mix(dataset, run.mix_env_ratio, **sizes, seed=args.seed, policy_strata=run.policy_strata)


def held_out_and_training_prompts(
    run: PromptOptions, args: GRPOConfig, tokenizer: Any, context: int
) -> tuple[Dataset, Dataset]:
    """The rows that the run is measured on, before and after, and those it trains on, in their order.

    Args:
        context: the model's, in tokens, of which every prompt must leave room for a completion.

    Raises:
        ValueError: a setting or a row that cannot be used; the message names it.
    """
    limits = {"policy": run.eval_policy_items, "environment": run.eval_environment_items}
    held_out, prompts = draw_of_each(load_shipped(run.eval_split), limits), training_prompts(run, args)
    for dataset in (prompts, held_out):
        check_lengths(dataset, tokenizer, context, args.max_completion_length)
    return held_out, prompts
