"""GRPO with verifiable chess rewards: measure a model, train it, measure it again on the same held-out items.

    accelerate launch --quiet recipes/grpo.py --config recipes/nano/grpo/config_cpu.yaml [--key value ...]

Writes to `output_dir`: checkpoint/ (model, tokenizer, card), summary.json, metrics.jsonl, plot.png, and every held-out
item's result in evaluation_before.json and evaluation_after.json.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from rookworld_trl import rewards
from rookworld_trl.checkpointing.exits import (
    DIVERGED,
    DONE,
    PREEMPTED,
    LastSteps,
    needs_disk,
    others_wait,
    reported,
    run_program,
)
from rookworld_trl.checkpointing.lock import locked
from rookworld_trl.checkpointing.rescue import rescued, write_model
from rookworld_trl.checkpointing.resume import choose_start, mark_finished
from rookworld_trl.config import bad_input, blame, option, parse_recipe
from rookworld_trl.data import load_shipped
from rookworld_trl.data.mixing import mix
from rookworld_trl.data.sources import DataOptions, check_lengths, load_prompts, without
from rookworld_trl.data.splits import draw_of_each
from rookworld_trl.evaluation import Evaluation, compare, compare_groups, comparison_table, evaluate
from rookworld_trl.files import write_atomically
from rookworld_trl.modeling.hub import push_folder
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.reports import plot_run, read_run
from rookworld_trl.reports.card import write_card
from rookworld_trl.reports.summary import timed, write_summary
from rookworld_trl.rewards.decisions import ChessPoints
from rookworld_trl.tasks import PREFIXES
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from rookworld_trl.training.live import report_live

REWARDS = {
    "graduated": [rewards.policy_reward, rewards.environment_reward],
    "continuous": [rewards.policy_reward_continuous, rewards.environment_reward_continuous],
}
# Of each step's line; a run logs one of the two forms of a reward.
COLUMNS = [
    *(
        (label, f"rewards/{task}_reward{form}/mean", "+.3f")
        for form in ("", "_continuous")
        for label, task in (("reward P", "policy"), ("A", "environment"))
    ),
    ("B legal", "policy/best_legal", ".0%"),
    ("skill", "policy/skill", "+.3f"),
    ("A exact", "environment/exact", ".0%"),
]
SHOWN = ["seed", "learning_rate", "beta", "temperature", "num_generations", "generation_batch_size", "num_iterations"]


@dataclass
class RunConfig(DataOptions):
    """What to train, on which prompts, for how long, and what to measure; the rest is RookWorldGRPOConfig's."""

    model: str = option(NANO, "`nano`, which comes with the package, a folder, or `owner/name` on the Hub.")
    model_revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    dataset: str = option(
        "shipped", "`shipped`, which comes with the package, a file (see docs/data.md), or `owner/name` on the Hub."
    )
    dataset_split: str = option("train", "Split of a data set on the Hub.")
    mix_env_ratio: float = option(0.2, "Share of `A:` prompts, exactly this in every batch.")
    policy_strata: dict[str, float] | None = option(
        None, "Exact shares of the `P:` prompts for what is rare, such as `{check: 0.25}`."
    )
    reward: Literal["graduated", "continuous"] = option(
        "graduated", "`graduated`, six levels from -0.3 to 1.0, or `continuous`."
    )
    max_train_minutes: float | None = option(
        None, "Training stops after the step in which this time is over, if `max_steps` has not ended it before."
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
        if self.max_train_minutes is not None and not self.max_train_minutes > 0:
            raise ValueError(f"`max_train_minutes` is {self.max_train_minutes}: it must be above 0, or left out")


def training_prompts(run: RunConfig, args: RookWorldGRPOConfig) -> Dataset:
    """Prompts in the order they are trained on: every generation batch holds exactly `mix_env_ratio` of `A:`."""
    dataset = load_shipped("train") if run.dataset == "shipped" else load_prompts(run.dataset, run.dataset_split, run)
    # All of both splits, whichever this run is measured on and however much of it.
    held_out = concatenate_datasets([load_shipped(split) for split in ("dev", "test")])
    dataset, dropped = without(dataset, held_out)
    if dropped:
        print(f"dropped {dropped} training prompts whose positions are held out")
    prompts_per_batch = args.generation_batch_size // args.num_generations
    # A generation batch feeds `steps_per_generation` micro-batches, `num_iterations` times over.
    steps_per_batch = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(dataset) / prompts_per_batch * steps_per_batch)
    batches = math.ceil(args.max_steps / steps_per_batch)
    args.shuffle_dataset = False  # the order is made here
    sizes = {"prompts_per_batch": prompts_per_batch, "batches": batches}
    return mix(dataset, run.mix_env_ratio, **sizes, seed=args.seed, policy_strata=run.policy_strata)


def load_start(run: RunConfig, args: RookWorldGRPOConfig) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer that training starts from."""
    with blame("model", run.model):
        return load(run.model, run.leading_eos, revision=run.model_revision, token=args.hub_token)


def build(run: RunConfig, args: RookWorldGRPOConfig) -> tuple[RookWorldGRPOTrainer, Dataset, Path]:
    """Model, tokenizer, prompts and rewards put together, every input checked on the way."""
    if unknown := set(args.task_sampling or {}) - set(PREFIXES):
        raise ValueError(
            f"`task_sampling` is {args.task_sampling}: there is no task {' or '.join(sorted(unknown))}. Choose from "
            f"{', '.join(PREFIXES)}"
        )
    model, tokenizer = load_start(run, args)
    limits = {"policy": run.eval_policy_items, "environment": run.eval_environment_items}
    held_out = draw_of_each(load_shipped(run.eval_split), limits)
    prompts = training_prompts(run, args)
    for dataset in (prompts, held_out):
        check_lengths(dataset, tokenizer, model.config.n_positions, args.max_completion_length)
    points = None if args.objective == "sampled" else ChessPoints(tokenizer)
    trainer = RookWorldGRPOTrainer(
        model, REWARDS[run.reward], args, prompts, processing_class=tokenizer, find_points=points
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report_live(trainer, folder, COLUMNS, run.max_train_minutes)
    return trainer, held_out, folder


def measure(run: RunConfig, trainer: RookWorldGRPOTrainer, held_out: Dataset, name: str) -> Evaluation | None:
    """Evaluate the policy as it is, on the main process; None on the others, and where a signal came."""
    if trainer.accelerator.is_main_process:
        print(f"\nheld-out evaluation {name} training: {len(held_out)} items of the {run.eval_split} split")
        model, tokenizer = trainer.merged_model(), trainer.processing_class
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # in shards, or still on the CPU: the one on disk
            folder = Path(trainer.args.output_dir, "checkpoint")
            model, _ = load_start(run, trainer.args) if name == "before" else load(folder)
            model.to(trainer.accelerator.device)
        settings = {"temperature": trainer.temperature, "max_new_tokens": trainer.max_completion_length}
        settings |= {"batch_size": run.eval_batch_size, "seed": trainer.args.seed}
        settings |= {"task_sampling": trainer.args.task_sampling}
        settings |= {"progress": True}
        return trainer.preemption.until_signalled(lambda: evaluate(model, tokenizer, held_out, **settings))
    return None


def write_items(path: Path, result: Evaluation) -> None:
    """Every item's result, as JSON."""
    with needs_disk(path):
        write_atomically(path, json.dumps(result.to_dict()) + "\n")


def run_recipe(argv: Sequence[str] | None) -> int:
    """Everything, and the exit code."""
    logging.disable_progress_bar()  # one bar is enough
    seconds: dict[str, float] = {}
    with ExitStack() as stack, reported():
        with bad_input(), reported(), timed(seconds, "setup"):
            run, args = parse_recipe((RunConfig, RookWorldGRPOConfig), argv)
            stack.enter_context(locked(args.output_dir, args.process_index == 0))
            start = choose_start(args, vars(run))
            if start.finished:
                return DONE
            set_seed(args.seed)
            trainer, held_out, folder = build(run, args)
            trainer.admit(start.checkpoint, vars(run))
        stack.enter_context(closing(trainer))
        stack.enter_context(trainer.preemption.watching())
        with timed(seconds, "evaluate_before"):
            with others_wait():
                before = measure(run, trainer, held_out, "before")
                if before is not None:
                    write_items(folder / "evaluation_before.json", before)
            if trainer.preempted():
                return PREEMPTED
        main = trainer.accelerator.is_main_process
        with rescued(trainer.save_merged, folder, main):
            with timed(seconds, "train"):
                trainer.train(resume_from_checkpoint=start.checkpoint)
            if trainer.preempted():
                return PREEMPTED  # after a checkpoint
            write_model(trainer.save_merged, folder, main)  # no push yet: the card comes first
        with timed(seconds, "evaluate_after"):
            with others_wait():
                after = measure(run, trainer, held_out, "after")
            if trainer.preempted():
                return PREEMPTED
        last = LastSteps()
        if before is not None and after is not None:  # the main process
            comparison, groups = compare(before, after), compare_groups(before, after)
            print(f"\n{comparison_table(comparison)}\n\n{comparison_table(comparison, True, groups)}")
            settings = {**vars(run), **{name: getattr(args, name) for name in SHOWN}}
            settings |= {"steps": trainer.state.global_step, "stop_reason": trainer.stop_reason}
            settings |= {"identity": trainer.identity.fingerprint, "groups": groups}
            with last.step("evaluation_after.json"):
                write_items(folder / "evaluation_after.json", after)
            with last.step("summary.json"):
                write_summary(folder, comparison=comparison, seconds=seconds, **settings)
            with last.step("model card"):
                write_card(folder, folder / "checkpoint")
            with last.step("plot.png"):
                plot_run(read_run(folder), folder / "plot.png")
            print(f"\nwrote {folder}/: {', '.join(['checkpoint', 'metrics.jsonl', *last.done])}")
            if args.push_to_hub:
                with last.step("push"):
                    push_folder(folder / "checkpoint", trainer.hub_model_id, args.hub_token, None, args.hub_revision)
        if trainer.stop_reason:
            return DIVERGED  # the reason is in the log and in summary.json
        if {"evaluation_after.json", "summary.json"} <= set(last.done):  # else `auto_resume` measures once more
            with last.step("finished.json"):
                mark_finished(folder, start, folder / "checkpoint")
        return last.code


def main(argv: Sequence[str] | None = None) -> None:
    run_program(lambda: run_recipe(argv))


if __name__ == "__main__":
    main()
