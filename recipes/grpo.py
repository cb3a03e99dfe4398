"""GRPO with verifiable chess rewards: measure a model, train it, measure it again on the same held-out items.

    accelerate launch --quiet recipes/grpo.py --config recipes/nano/grpo/config_cpu.yaml [--key value ...]

Writes to `output_dir`: checkpoint/ (model, tokenizer, card), summary.json, metrics.jsonl, report.html, and every
held-out item's result in evaluation_before.parquet and evaluation_after.parquet. `--help` lists all keys.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedModel, logging, set_seed

from rookworld_trl import plugins, ranks
from rookworld_trl.checkpointing import stopping
from rookworld_trl.checkpointing.resume import choose_start, mark_finished
from rookworld_trl.checkpointing.stopping import locked, reported
from rookworld_trl.chess import boards
from rookworld_trl.chess.accuracy import Watch, evaluate
from rookworld_trl.chess.prompts import PromptOptions, held_out_and_training_prompts, provenance, self_play
from rookworld_trl.chess.rewards import COLUMNS, REWARDS, ChessPoints
from rookworld_trl.files import needs_disk
from rookworld_trl.measuring import Result, compare, compare_groups, comparison_table, write_results
from rookworld_trl.modeling.hub import push_folder
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.plugins.curriculum import Stages
from rookworld_trl.plugins.dry_run import rehearsed
from rookworld_trl.plugins.live import report_live
from rookworld_trl.plugins.origin import forked
from rookworld_trl.plugins.selfplay_prompts import SelfPlayPrompts
from rookworld_trl.reports import timed, write_for_people
from rookworld_trl.settings.parser import bad_input, blame, option, parse
from rookworld_trl.settings.terminal import TerminalOptions, shown
from rookworld_trl.training import Plugin, RookWorldGRPOConfig, RookWorldGRPOTrainer


@dataclass
class RunConfig(PromptOptions, TerminalOptions):
    """What to train, on which prompts, for how long, what to measure and to show; the rest is RookWorldGRPOConfig's."""

    model: str = option(NANO, "`nano`, which comes with the package, a folder, or `owner/name` on the Hub.")
    model_revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    expected_parameters: int | None = option(None, "Refuse a model with another number of parameters.")
    reward: Literal["graduated", "continuous"] = option("graduated", "Six levels from -0.3 to 1.0, or `continuous`.")


CLASSES = (RunConfig, RookWorldGRPOConfig, *plugins.offered())


def load_start(run: RunConfig, args: RookWorldGRPOConfig) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer that training starts from."""
    with blame("model", run.model):
        source = {"revision": run.model_revision, "token": args.hub_token}
        return load(run.model, run.leading_eos, expected_parameters=run.expected_parameters, **source)


def build(run: RunConfig, args: RookWorldGRPOConfig, *extras: Plugin) -> tuple[RookWorldGRPOTrainer, Dataset]:
    """Model, tokenizer, prompts and rewards put together, every input checked on the way."""
    model, tokenizer = load_start(run, args)
    held_out, watched, prompts = held_out_and_training_prompts(run, args, tokenizer, model.config.n_positions)
    points = None if args.objective == "sampled" else ChessPoints(tokenizer)
    extras += (Stages(prompts, run.stage_ends),) if run.stages else ()
    extras += (SelfPlayPrompts(self_play(run, args, model, tokenizer, prompts, watched)),) if run.self_play else ()
    plan: Any = {"find_points": points, "plugins": extras}
    trainer = RookWorldGRPOTrainer(model, REWARDS[run.reward], args, prompts, watched, tokenizer, **plan)
    if watched is not None:
        trainer.watch_with(Watch(tokenizer, run.reward, args.metric_for_best_model, run.decoding(args)))
    report_live(trainer, Path(args.output_dir), COLUMNS)
    return trainer, held_out


def measure(
    run: RunConfig, trainer: RookWorldGRPOTrainer, held_out: Dataset, name: str, seconds: dict[str, float]
) -> list[Result] | None:
    """Evaluate the policy as it is, on the main process while the others wait; None on these."""
    found = None
    with timed(seconds, f"evaluate_{name}"), ranks.others_wait():
        if trainer.accelerator.is_main_process:
            print(f"\nheld-out evaluation {name} training: {len(held_out)} items of the {run.eval_split} split")
            args, model, tokenizer = trainer.args, trainer.merged_model(), trainer.processing_class
            if trainer.sharded:  # in shards, or still on the CPU: the one on disk
                model, _ = load_start(run, args) if name == "before" else load(Path(args.output_dir, "checkpoint"))
                model.to(trainer.accelerator.device)
            settings = {"progress": True, **run.decoding(args)}
            found = evaluate(model, tokenizer, held_out, **settings)
            file = Path(args.output_dir, f"evaluation_{name}.parquet")
            if name == "before":  # the other one is a last step: `report`
                with needs_disk(file):
                    write_results(file, found)
    return found


def report(trainer: RookWorldGRPOTrainer, before: list[Result], after: list[Result], start: Any, **facts: Any) -> int:
    """What people see of a run: the comparison, its files, card and report, and a push if asked for; the exit code."""
    args, folder, last = trainer.args, Path(trainer.args.output_dir), stopping.LastSteps()
    groups = compare_groups(before, after)
    print(f"\n{comparison_table(facts['metrics'])}\n\n{comparison_table(facts['metrics'], True, groups)}")
    with last.step("evaluation_after.parquet"):
        write_results(folder / "evaluation_after.parquet", after)
    write_for_people(folder, last.step, args, boards, **facts, groups=groups, identity=trainer.identity.fingerprint)
    print(f"\nwrote {folder}/: {', '.join(['checkpoint', 'metrics.jsonl', *last.done])}")
    print(f"{trainer.state.global_step} of {trainer.state.max_steps} planned steps were made")
    if args.push_to_hub:
        with last.step("push"):
            push_folder(folder / "checkpoint", trainer.hub_model_id, args.hub_token, args.hub_revision)
    if trainer.stop_reason:
        return stopping.DIVERGED  # the reason is in the log and in summary.json
    if {"evaluation_after.parquet", "summary.json"} <= set(last.done):  # else `auto_resume` measures once more
        with last.step("finished.json"):
            mark_finished(folder, start)
    return last.code


def program(argv: Sequence[str] | None) -> int:
    """Parse, build, measure, train, measure, report."""
    logging.disable_progress_bar()  # one bar is enough
    seconds: dict[str, float] = {}
    with ExitStack() as stack, reported():
        with bad_input(), timed(seconds, "setup"):
            argv = forked(argv)
            run, args, *extras = parse(CLASSES, argv, __doc__, plugins.check)
            dry_run = stack.enter_context(rehearsed(args, extras))
            stack.enter_context(locked(args.output_dir, args.process_index == 0))
            result = stack.enter_context(shown(run, args.output_dir, args.process_index == 0))
            asked = vars(run) | plugins.settings_of(extras)
            start = choose_start(args, asked)
            if start.finished:
                return stopping.DONE
            set_seed(args.seed)
            trainer, held_out = build(run, args, *extras)
            trainer.admit(start.checkpoint, asked)
        with trainer.at_work():
            if dry_run:
                some = partial(measure, run, trainer, name="before", seconds=seconds)
                return dry_run.rehearse(trainer, start.checkpoint, result, held_out, some)
            before = measure(run, trainer, held_out, "before", seconds)
            if trainer.preempted():  # a signal came to any process; what was trained is a checkpoint
                return stopping.PREEMPTED
            with timed(seconds, "train"):
                trainer.train(resume_from_checkpoint=start.checkpoint)
            if trainer.preempted():
                return stopping.PREEMPTED
            trainer.write_model()  # no push yet: the card comes first
            after = measure(run, trainer, held_out, "after", seconds)
            if trainer.preempted():
                return stopping.PREEMPTED
            if before is None or after is None:  # not the main process
                return stopping.DIVERGED if trainer.stop_reason else stopping.DONE
            result |= trainer.outcome | {"metrics": compare(before, after)} | provenance(run, trainer.train_dataset)
            facts = vars(run) | plugins.facts_of(extras) | result
            return report(trainer, before, after, start, **facts, seconds=seconds)


def main(argv: Sequence[str] | None = None) -> None:
    stopping.run_program(lambda: program(argv))


if __name__ == "__main__":
    main()
