"""Supervised training: a GPT-2 from scratch (or from a checkpoint) on `P:` and `A:` rows, loss on completions only.

    accelerate launch --quiet recipes/sft.py --config recipes/nano/sft/config_cpu.yaml

Rows come from the positions that `recipes/generate_data.py positions` wrote. Run the same command again to resume; what
was interrupted, damaged or finished is seen, and the exit code says how it went (`rookworld_trl.checkpointing.exits`).
"""

if __name__ == "__main__":  # before what takes seconds to import
    from rookworld_trl.help import show_help

    show_help(__file__)

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from rookworld_trl.checkpointing.exits import DONE, PREEMPTED, needs_disk, reported, run_program
from rookworld_trl.checkpointing.identity import weights_digest
from rookworld_trl.checkpointing.lock import locked
from rookworld_trl.checkpointing.resume import choose_start, mark_finished
from rookworld_trl.config import RecipeError, bad_input, option, parse_recipe
from rookworld_trl.data.splits import HELD_OUT_ANSWERS
from rookworld_trl.data.supervised import ROWS_VERSION, supervised_rows
from rookworld_trl.files import write_atomically
from rookworld_trl.modeling.hub import hide_token
from rookworld_trl.modeling.loading import load_model, load_tokenizer
from rookworld_trl.modeling.starting_weights import set_starting_weights
from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer, build_nano_tokenizer
from rookworld_trl.terminal import TerminalOptions, shown
from rookworld_trl.training.live import report_live
from rookworld_trl.training.supervised import MuonFactory, SupervisedConfig, SupervisedTrainer

LIVE = [("loss", "loss", ".4f"), ("gradient", "grad_norm", ".2f"), ("rate", "learning_rate", ".2e")]
SORTED_BATCHES = 64  # in as many batches of a task the rows are sorted by length, so that little padding is computed

# Fields that say where something lies or how it is read, not what; hashes of the content stand for them.
PLACES = (
    *(field.name for field in fields(TerminalOptions)),
    "positions",
    "first_shard",
    "max_shards",
    "init_from",
    "average_with",
    "num_proc",
)


@dataclass
class SFTRecipe(TerminalOptions):
    """What to train, on what, and with which optimizer."""

    positions: str = option("data/positions", "Folder of the shards that `generate_data.py positions` wrote.")
    first_shard: int = option(0, "Number of the first shard to use.")
    max_shards: int | None = option(None, "Shards to use; default: all.")
    environment_share: float = option(1.0, "`A:` rows for each `P:` row; above 1: several moves in the same position.")
    listing_share: float = option(0.0, "`L:` rows, which list all legal moves, for each `P:` row.")
    scarce_share: float = option(
        0.0, "Share of the positions that offer a mate, a promotion or the like which give one more `A:` row of it."
    )
    check_share: float = option(
        0.0,
        "Share of the positions in check, or before one, which give one more `L:` row and the `P:` row three times.",
    )
    init_from: str | None = option(None, "Checkpoint to start from; default: a new model of the size below.")
    average_with: list[str] = field(
        default_factory=list, metadata={"help": "The mean of these checkpoints and the trained model is saved."}
    )
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
    num_proc: int = option(2, "Processes that write the rows.")

    def row_options(self) -> tuple[Any, ...]:
        """What `supervised_rows` takes behind the seed, in its order."""
        return self.environment_share, self.listing_share, self.scarce_share, self.check_share


def encode_shard(shard: str, recipe: SFTRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict[str, Any]]:
    """Rows of one shard as token ids, with labels on the completion and its end token only."""
    rows = []
    for row in supervised_rows([Path(shard)], seed, *recipe.row_options()):
        prompt = tokenizer(row["prompt"]).input_ids
        completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = prompt + completion
        if len(ids) <= recipe.n_positions:  # a position with eighty moves makes a longer L: row
            labels = [-100] * len(prompt) + completion
            rows.append({"task": row["task"], "input_ids": ids, "labels": labels, "length": len(ids)})
    return rows


def load_rows(recipe: SFTRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[Dataset, str]:
    """The training rows (cached beside the shards) and a hash of what they were made from."""
    directory = Path(recipe.positions)
    shards = sorted(directory.glob("positions-*.parquet"))[recipe.first_shard :][: recipe.max_shards]
    if not shards:
        raise RecipeError(
            f"positions: {directory} holds no positions-*.parquet from number {recipe.first_shard} on; make some with "
            "generate_data.py"
        )
    options = " ".join(map(str, (*recipe.row_options(), recipe.n_positions)))
    settings = f"{ROWS_VERSION} {seed} {options} {tokenizer.backend_tokenizer.to_str()}"
    digest = hashlib.sha256(settings.encode() + HELD_OUT_ANSWERS.read_bytes())
    for shard in shards:
        digest.update(hashlib.sha256(shard.read_bytes()).digest())
    cache = directory / f"rows-{digest.hexdigest()[:16]}"
    if not cache.exists():
        names = Dataset.from_dict({"shard": [str(shard) for shard in shards]})
        rows = names.map(
            lambda batch: _columns(encode_shard(batch["shard"][0], recipe, tokenizer, seed)),
            batched=True,
            batch_size=1,
            remove_columns=["shard"],
            num_proc=recipe.num_proc,
            desc="Writing rows",
        )
        whole = cache.with_name(f".{cache.name}-{os.getpid()}")  # a killed process leaves no part of a cache
        rows.save_to_disk(whole)
        whole.rename(cache)
    return load_from_disk(cache), digest.hexdigest()


def uniform_batches(rows: Dataset, batch_size: int, seed: int) -> Dataset:
    """The rows in an order in which each batch holds one task only, of nearly one length: hardly any padding is
    computed. The rows within a task and the batches are shuffled; incomplete batches are left out."""
    generator = np.random.default_rng(seed)
    tasks, lengths = np.asarray(rows["task"]), np.asarray(rows["length"])
    batches: list[np.ndarray] = []
    for task in np.unique(tasks):
        group = generator.permutation(np.flatnonzero(tasks == task))
        group = group[: len(group) // batch_size * batch_size]
        for start in range(0, len(group), SORTED_BATCHES * batch_size):
            chunk = group[start : start + SORTED_BATCHES * batch_size]
            batches.extend(chunk[np.argsort(lengths[chunk], kind="stable")].reshape(-1, batch_size))
    order = generator.permutation(len(batches))
    return rows.select(np.concatenate([batches[i] for i in order]))


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in ("task", "input_ids", "labels", "length")}


def new_model(recipe: SFTRecipe, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 of the recipe's size without dropout; see `rookworld_trl.modeling.starting_weights`."""
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
    set_starting_weights(model, tokenizer, squares_named=recipe.tokenizer == "nano")
    return model


def load_others(model: GPT2LMHeadModel, folders: Sequence[str]) -> list[GPT2LMHeadModel]:
    """The checkpoints to average with, of the model's own size."""
    sizes = {name: weight.shape for name, weight in model.named_parameters()}
    others = [load_model(folder) for folder in folders]
    for folder, other in zip(folders, others, strict=True):
        if {name: weight.shape for name, weight in other.named_parameters()} != sizes:
            raise RecipeError(f"average_with: {folder} holds a model of another size than the one to train")
    return others


def average(model: GPT2LMHeadModel, others: Sequence[GPT2LMHeadModel]) -> None:
    """Make the model's weights the mean of its own and the others': a "model soup", https://arxiv.org/abs/2203.05482.

    Each part of a training favours what it has much of; of parts that began where another ended, the mean is better at
    all of it than any of them.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.stack([weight.cpu(), *(other.get_parameter(name) for other in others)]).mean(0))


def build(recipe: SFTRecipe, args: SupervisedConfig) -> tuple[SupervisedTrainer, list[GPT2LMHeadModel]]:
    """The trainer with its model and rows, and the models to average with."""
    if recipe.init_from:
        tokenizer, model = load_tokenizer(recipe.init_from), load_model(recipe.init_from)
    else:
        tokenizer = build_nano_tokenizer() if recipe.tokenizer == "nano" else build_gpt2_tokenizer()
        model = new_model(recipe, tokenizer)
    others = load_others(model, recipe.average_with)
    with args.main_process_first():
        rows, data_hash = load_rows(recipe, tokenizer, args.seed)
    order = args.seed if args.data_seed is None else args.data_seed
    facts = {name: value for name, value in vars(recipe).items() if name not in PLACES}
    facts |= {"data_sha256": data_hash, "rates": [args.learning_rate, recipe.muon_lr]}
    if recipe.init_from:
        facts["start"] = weights_digest(model.state_dict())
    muon = {"muon_lr": recipe.muon_lr, "adamw_lr": args.learning_rate}
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        train_dataset=uniform_batches(rows, args.per_device_train_batch_size, order).remove_columns(["task", "length"]),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MuonFactory, muon) if recipe.optimizer == "muon" else None,
        facts=facts,
    )
    return trainer, others


def run_recipe(argv: Sequence[str] | None) -> int:
    """Everything, and the exit code."""
    with ExitStack() as stack:
        with bad_input(), reported():
            recipe, args = parse_recipe((SFTRecipe, SupervisedConfig), argv)
            hide_token(args)
            stack.enter_context(locked(args.output_dir, args.process_index == 0))
            result = stack.enter_context(shown(recipe, args.output_dir, args.process_index == 0))
            start = choose_start(args, {**vars(recipe), "rates": [args.learning_rate, recipe.muon_lr]})
            if start.finished:
                return DONE
            set_seed(args.seed)
            trainer, others = build(recipe, args)
            report_live(trainer, Path(args.output_dir), LIVE)
        with reported():
            trainer.train(start.checkpoint)
            if trainer.preemption.signal:
                return PREEMPTED  # after a checkpoint
            average(trainer.accelerator.unwrap_model(trainer.model), others)
            trainer.save_final()
        if args.should_save:
            folder = Path(args.output_dir)
            facts = {"rows": len(trainer.train_dataset), "seed": args.seed, "steps": trainer.state.global_step}
            facts |= {"data_seed": args.data_seed, "data_sha256": trainer.facts()["data_sha256"]}
            facts |= {"init_from": recipe.init_from, "average_with": recipe.average_with}
            result |= facts
            with reported(), needs_disk(folder / "training.json"):
                write_atomically(folder / "training.json", json.dumps(facts, indent=2) + "\n")
                mark_finished(folder, start, folder)
        return DONE


def main(argv: Sequence[str] | None = None) -> None:
    run_program(partial(run_recipe, argv))


if __name__ == "__main__":
    main()
