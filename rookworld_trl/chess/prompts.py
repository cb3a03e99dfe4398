"""The prompts of a GRPO run: those it trains on, in their order, and those it is measured on."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedModel
from trl import GRPOConfig

from rookworld_trl.chess import PREFIXES
from rookworld_trl.chess.dataset import Report, draw_of_each, held_out_positions, load_shipped, positions_in
from rookworld_trl.chess.engine import find_engine
from rookworld_trl.chess.mixing import check_stages, lay_out, mix
from rookworld_trl.chess.own_games import PLACE_COLUMN, SelfPlay, read_options
from rookworld_trl.chess.policy import SPELLINGS, respelled
from rookworld_trl.chess.seen import known_training_data
from rookworld_trl.chess.sources import (
    DataOptions,
    check_lengths,
    engines,
    load_prompts,
    with_values,
    without,
)
from rookworld_trl.settings.parser import blame, option


@dataclass
class PromptOptions(DataOptions):
    """Which prompts a run trains on, in which shares, and on which it is measured."""

    dataset: str = option(
        "shipped",
        "`shipped`, which comes with the package, a file (see docs/data.md), a folder that `generate_data.py dataset` "
        "wrote, or `owner/name` on the Hub.",
    )
    dataset_split: str = option("train", "Split of a data set on the Hub.")
    spelling: Literal["single", "padded"] | None = option(
        None,
        "Spelling of the right answers of `P:` prompts, whose log-prob is followed: one space between fields, or "
        "RookWorld's `padded` fields and evals, which RookWorld-LM writes; default: as the data has them.",
    )
    mix_env_ratio: float = option(0.2, "Share of `A:` prompts, exactly this in every batch.")
    policy_strata: dict[str, float] | None = option(
        None,
        "Exact shares of the `P:` prompts for what is rare, such as `{check: 0.25}`.",
    )
    stages: list[dict[str, Any]] | None = option(
        None,
        "A curriculum: stages that end at `until_step` or at `until_pass_rate` (the share of completions with a reward "
        "of 1), each with its `mix_env_ratio`, `policy_strata` and `temperature`.",
    )
    self_play: dict[str, Any] | None = option(
        None,
        "Prompts from the policy's own games: `games` of up to `plies` plies every so many `batches`, `per_opening` "
        "positions at most of those that begin alike, played at one of the `temperatures` after the other. `best_move` "
        "`engine` values positions that the data set has no values of.",
    )
    eval_split: Literal["dev", "test"] = option("test", "`dev` to choose settings, `test` to believe a result.")
    eval_policy_items: int | None = option(None, "Held-out `P:` items to measure, drawn at random; default: all.")
    eval_environment_items: int | None = option(None, "Held-out `A:` items to measure, drawn at random; default: all.")
    eval_batch_size: int = option(128, "Prompts decoded at a time in the evaluation.")
    eval_dataset: str = option(
        "shipped",
        "Held-out rows to watch while training, every `eval_steps` where `eval_strategy` is `steps`: the `shipped` dev "
        "split, or a file. Nothing is trained on that shows one of its positions.",
    )
    eval_items: int = option(250, "Rows of each task to watch, drawn at random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages or ())
        if self.self_play is not None:
            read_options(self.self_play)
            if self.stages:
                raise ValueError("`self_play` and `stages` both choose the prompts. Leave one of them out")
        for name in ("eval_policy_items", "eval_environment_items", "eval_batch_size", "eval_items"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}: nothing would be measured. Set it to 1 or more")

    @property
    def stage_ends(self) -> list[tuple[int | None, float | None]]:
        """When each stage but the last is over, as `rookworld_trl.plugins.curriculum` takes it."""
        return [(stage.get("until_step"), stage.get("until_pass_rate")) for stage in (self.stages or [])[:-1]]

    def decoding(self, args: GRPOConfig) -> dict[str, Any]:
        """How held-out prompts are completed, in `evaluate`'s arguments: as training samples them."""
        settings = {"temperature": args.temperature, "max_new_tokens": args.max_completion_length, "seed": args.seed}
        return settings | {"task_sampling": args.task_sampling, "batch_size": self.eval_batch_size}


def training_prompts(run: PromptOptions, args: GRPOConfig, watched: Dataset | None = None) -> Dataset:
    """Prompts in the order they are trained on: every generation batch holds exactly `mix_env_ratio` of `A:`.

    Sets `args.max_steps` where the epochs decide it, and `args.shuffle_dataset`, for the order is made here.
    """
    folder, split = Path(run.dataset), run.dataset_split
    if run.dataset == "shipped":
        dataset = load_shipped("train")
    else:  # a folder that `generate_data.py dataset` wrote, a file or the Hub
        dataset = load_shipped(split, folder) if folder.is_dir() else load_prompts(run.dataset, split, run)
    # All that is shipped to measure on, whatever of it this run is measured on.
    own = positions_in(watched) if watched is not None else set()
    dataset, dropped = without(dataset, held_out_positions() | own)
    if dropped:
        print(f"dropped {dropped} training prompts whose positions are held out")
    if run.spelling:
        dataset = dataset.map(partial(respelled, spelling=SPELLINGS[run.spelling]), keep_in_memory=True)
    prompts_per_batch = args.generation_batch_size // args.num_generations
    # A generation batch feeds `steps_per_generation` micro-batches, `num_iterations` times over.
    steps_per_batch = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(dataset) / prompts_per_batch * steps_per_batch)
    args.shuffle_dataset = False
    sizes = {"prompts_per_batch": prompts_per_batch, "batches": math.ceil(args.max_steps / steps_per_batch)}
    shares = (run.mix_env_ratio, run.policy_strata)
    if run.stages:
        return lay_out(dataset, run.stages, *shares, args.temperature, **sizes, seed=args.seed)
    mixed = mix(dataset, shares[0], **sizes, seed=args.seed, policy_strata=shares[1])
    return mixed.add_column(PLACE_COLUMN, list(range(len(mixed)))) if run.self_play else mixed


def self_play(
    run: PromptOptions,
    args: GRPOConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Dataset,
    watched: Dataset | None,
) -> SelfPlay:
    """What puts positions of the model's own games in place of the training prompts.

    Raises:
        ValueError: several processes, of which each would play games of its own; adapters, with which it does not play;
            an engine is asked for that is not there.
    """
    if args.world_size > 1 or getattr(args, "use_peft", False):
        what = f"there are {args.world_size} processes" if args.world_size > 1 else "`use_peft` is true"
        raise ValueError(f"`self_play` is given and {what}: it takes a whole model in one process. Leave it out")
    valued = run.best_move == "engine"
    if valued:
        with blame("best_move", run.best_move):
            find_engine()

    def values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with engines(run) as pool:
            return list(with_values(rows, pool, Report()))

    assert run.self_play is not None
    return SelfPlay(
        read_options(run.self_play),
        prompts,
        args.generation_batch_size // args.num_generations,
        model,
        tokenizer,
        max_new_tokens=args.max_completion_length,
        seed=args.seed,
        values=values if valued else None,
        held_out=positions_in(watched) if watched is not None else (),
    )


def provenance(run: Any, prompts: Dataset) -> dict[str, Any]:
    """What `summary.json` says of the training data beside its name: where the file lies, for a later look from another
    folder, what became of its rows, as `load_prompts` printed it, and what is unknown of the data of `run.model`."""
    place = str(Path(run.dataset).resolve()) if Path(run.dataset).exists() else ""
    unknown = known_training_data([run.model]).unknown
    return {"dataset_path": place, "data_report": prompts.info.description, "unknown_training": unknown}


def held_out_and_training_prompts(
    run: PromptOptions, args: GRPOConfig, tokenizer: Any, context: int
) -> tuple[Dataset, Dataset | None, Dataset]:
    """The rows that the run is measured on before and after, those while it trains, and those it trains on, in order.

    Args:
        context: the model's, in tokens, of which every prompt must leave room for a completion.

    Raises:
        ValueError: a setting or a row that cannot be used; the message names it.
    """
    if unknown := sorted({*(args.task_sampling or {})} - {*PREFIXES}):
        raise ValueError(f"`task_sampling`: there is no task {' or '.join(unknown)}. Choose from {', '.join(PREFIXES)}")
    limits = {"policy": run.eval_policy_items, "environment": run.eval_environment_items}
    held_out, watched = draw_of_each(load_shipped(run.eval_split), limits), None
    if args.eval_strategy != "no":
        try:
            shipped = run.eval_dataset == "shipped"
            watched = load_shipped("dev") if shipped else load_prompts(run.eval_dataset, run.dataset_split, run)
        except ValueError as error:
            raise ValueError(str(error).replace("`dataset` is", "`eval_dataset` is")) from error
    prompts = training_prompts(run, args, watched)
    if watched is not None:
        watched = draw_of_each(watched, dict.fromkeys(("policy", "environment"), run.eval_items))
    for dataset in (prompts, held_out, watched):
        if dataset is not None:
            check_lengths(dataset, tokenizer, context, args.max_completion_length)
    return held_out, watched, prompts
