"""Supervised training: a GPT-2 from scratch (or from a checkpoint) on `P:` and `A:` rows, loss on completions only.

    accelerate launch --quiet recipes/sft.py --config recipes/nano/sft/config_cpu.yaml

Rows come from the positions that `recipes/generate_data.py positions` wrote. Run the same command again to resume; what
was interrupted, damaged or finished is seen, and the exit code says how it went (docs/resume.md). After a run that
diverged, `--recovery_mode` goes back further and halves the learning rates.
"""

if __name__ == "__main__":
    import sys  # run as a file, it does not find `recipes` by itself
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from recipes.making.starting_weights import set_starting_weights
from recipes.making.trees import VERSION, Words, position_trees, read_positions, with_twins
from rookworld_trl import plugins
from rookworld_trl.checkpointing.resume import choose_start, mark_finished, weights_digest
from rookworld_trl.checkpointing.stopping import DONE, PREEMPTED, locked, reported, run_program
from rookworld_trl.chess.dataset import HELD_OUT_ANSWERS
from rookworld_trl.files import needs_disk, write_atomically
from rookworld_trl.modeling.hub import hide_token
from rookworld_trl.modeling.loading import load_model, load_tokenizer
from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer, build_nano_tokenizer
from rookworld_trl.plugins.dry_run import rehearsed
from rookworld_trl.plugins.live import report_live
from rookworld_trl.plugins.origin import forked
from rookworld_trl.settings.parser import RecipeError, bad_input, option, parse
from rookworld_trl.settings.terminal import TerminalOptions, shown
from rookworld_trl.training import Plugin
from rookworld_trl.training.supervised import MuonFactory, SupervisedConfig, SupervisedTrainer

LIVE = [("loss", "loss", ".4f"), ("gradient", "grad_norm", ".2f"), ("rate", "learning_rate", ".2e")]

# Fields that say where something lies or what is shown; hashes of the content stand for them.
PLACES = (*(field.name for field in fields(TerminalOptions)), "positions", "init_from")


@dataclass
class SFTRecipe(TerminalOptions):
    """What to train, on what, and with which optimizer."""

    positions: str = option("data/positions", "Folder of the shards that `generate_data.py positions` wrote.")
    init_from: str | None = option(None, "Checkpoint to start from; default: a new model of the size below.")
    mirror: bool = option(False, "Show each position with the colours exchanged, too.")
    legal_lists: float = option(0.0, "Share of `P:` rows whose place `L:` rows take, lists of legal moves.")
    tokenizer: Literal["nano", "gpt2"] = option(
        "nano", "Tokenizer of a new model; `gpt2`: GPT-2's 50,257 tokens, as RookWorld-LM has them."
    )
    n_layer: int = option(4, "Layers of a new model.")
    n_embd: int = option(128, "Width of a new model.")
    n_head: int = option(4, "Attention heads of a new model.")
    n_positions: int = option(256, "Context of a new model, in tokens.")
    optimizer: Literal["muon", "adamw"] = option(
        "muon", "`muon` trains the block matrices with Muon and embeddings, norms and biases with AdamW."
    )
    muon_lr: float = option(0.02, "Learning rate of Muon.")


def load_trees(
    recipe: SFTRecipe, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> tuple[Dataset, str]:
    """What is trained on, and a hash of what it is made from."""
    directory = Path(recipe.positions)
    shards = sorted(directory.glob("positions-*.parquet"))
    if not shards:
        raise RecipeError(f"positions: {directory} holds no positions-*.parquet; make some with generate_data.py")
    positions, digest = read_positions(shards)
    if recipe.mirror:
        positions = with_twins(positions)
    trees = position_trees(positions, Words(tokenizer), batch_size, seed, recipe.legal_lists)
    if not len(trees):
        raise RecipeError(f"positions: {directory} holds {len(positions)} positions, too few for a step; make more")
    settings = f"{VERSION} {tokenizer.backend_tokenizer.to_str()} {digest}"
    return trees, hashlib.sha256(settings.encode() + HELD_OUT_ANSWERS.read_bytes()).hexdigest()


CLASSES = (SFTRecipe, SupervisedConfig, *plugins.of_any_trainer())


def new_model(recipe: SFTRecipe, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 of the recipe's size without dropout; see `recipes.making.starting_weights`."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.n_positions,
            n_embd=recipe.n_embd,
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    set_starting_weights(model, tokenizer, squares_named=recipe.tokenizer != "gpt2")
    return model


def build(recipe: SFTRecipe, args: SupervisedConfig, *extras: Plugin) -> SupervisedTrainer:
    """The trainer with its model and rows."""
    if recipe.init_from:
        tokenizer, model = load_tokenizer(recipe.init_from), load_model(recipe.init_from)
    else:
        tokenizer = build_gpt2_tokenizer() if recipe.tokenizer == "gpt2" else build_nano_tokenizer()
        model = new_model(recipe, tokenizer)
    trees, data_hash = load_trees(recipe, tokenizer, args.per_device_train_batch_size, args.seed)
    facts = {name: value for name, value in vars(recipe).items() if name not in PLACES}
    facts |= {"data_sha256": data_hash, "rates": [args.learning_rate, recipe.muon_lr]}
    if recipe.init_from:
        facts["start"] = weights_digest(model.state_dict())
    muon = {"muon_lr": recipe.muon_lr, "adamw_lr": args.learning_rate}
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        train_dataset=trees,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MuonFactory, muon) if recipe.optimizer == "muon" else None,
        facts=facts,
    )
    for each in (each for each in extras if each.on):
        trainer.add_callback(each)
    return trainer


def program(argv: Sequence[str] | None) -> int:
    """Parse, build, train, save; the exit code."""
    with ExitStack() as stack, reported():
        with bad_input():
            argv = forked(argv, "init_from")
            recipe, args, *extras = parse(CLASSES, argv, __doc__)
            hide_token(args)
            dry_run = stack.enter_context(rehearsed(args, extras))
            stack.enter_context(locked(args.output_dir, args.process_index == 0))
            result = stack.enter_context(shown(recipe, args.output_dir, args.process_index == 0))
            start = choose_start(args, {**vars(recipe), "rates": [args.learning_rate, recipe.muon_lr]})
            if start.finished:
                return DONE
            set_seed(args.seed)
            trainer = build(recipe, args, *extras)
            report_live(trainer, Path(args.output_dir), LIVE)
        if dry_run:
            return dry_run.rehearse(trainer, start.checkpoint, result)
        trainer.train(start.checkpoint)
        if trainer.preemption.signal:
            return PREEMPTED  # after a checkpoint
        trainer.save_final()
        if args.should_save:
            folder = Path(args.output_dir)
            result |= {"seed": args.seed, "steps": trainer.state.global_step, "init_from": recipe.init_from}
            result |= {"tokens": trainer.tokens, "data_sha256": trainer.facts()["data_sha256"]}
            result |= plugins.facts_of(extras)
            facts = {name: value for name, value in result.items() if name != "output_dir"}
            with needs_disk(folder / "training.json"):
                write_atomically(folder / "training.json", json.dumps(facts, indent=2) + "\n")
                mark_finished(folder, start)
        return DONE


def main(argv: Sequence[str] | None = None) -> None:
    run_program(partial(program, argv))


if __name__ == "__main__":
    main()
