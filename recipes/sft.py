"""Supervised training: a GPT-2 from scratch (or from a checkpoint) on `P:` and `A:` rows, loss on completions only.

    accelerate launch --quiet recipes/sft.py --config recipes/nano/sft/config_cpu.yaml

Rows come from the positions that `recipes/generate_data.py positions` wrote. Run the same command again to resume.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from rookworld_trl.checkpointing.exits import run_program
from rookworld_trl.checkpointing.lock import locked
from rookworld_trl.config import RecipeError, bad_input, parse_recipe
from rookworld_trl.data.supervised import ROWS_VERSION, supervised_rows
from rookworld_trl.modeling.hub import hide_token
from rookworld_trl.modeling.loading import load_model, load_tokenizer
from rookworld_trl.modeling.starting_weights import set_starting_weights
from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer, build_nano_tokenizer
from rookworld_trl.training.optimizers import MuonFactory

SORTED_BATCHES = 64  # in as many batches of a task the rows are sorted by length, so that little padding is computed
NATS_SCALE = 32  # the loss is nats a completion divided by this, about the tokens of rookworld-nano's `A:` completion


@dataclass
class SFTRecipe:
    """What to train, on what, and with which optimizer."""

    positions: str = "data/positions"
    first_shard: int = 0
    max_shards: int | None = None
    environment_share: float = 1.0  # A: rows for each P: row
    listing_share: float = 0.0  # L: rows (all legal moves) for each P: row
    scarce_share: float = 0.0  # of the positions that offer a mate, a promotion or the like: one more A: row of it
    check_share: float = 0.0  # of the positions in check, or before one: one more L: row, and the P: row three times
    best_first: bool = False  # P: candidates begin with the best; else all are in UCI order
    init_from: str | None = None  # a checkpoint to start from; none: a new model of the size below
    average_with: list[str] = field(default_factory=list)  # the mean of these and the trained model is saved
    tokenizer: Literal["nano", "gpt2"] = "nano"  # of a new model; gpt2: GPT-2's 50,257 tokens, as RookWorld-LM has them
    n_layer: int = 4
    n_embd: int = 128
    n_head: int = 4
    n_positions: int = 256
    optimizer: str = field(default="muon", metadata={"help": "muon (with AdamW beside it) or adamw"})
    muon_lr: float = 0.02
    num_proc: int = 2

    def row_options(self) -> tuple[Any, ...]:
        """What `supervised_rows` takes behind the seed, in its order."""
        return self.environment_share, self.listing_share, self.scarce_share, self.check_share, self.best_first


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
    digest = hashlib.sha256(settings.encode())
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
        rows.save_to_disk(cache)
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


class RowLossTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is the mean over a step's completions, not over their tokens: nats a completion / 32.

    An `A:` completion has three times the tokens of a `P:` completion and most are copied, so that a loss per token
    has gradients a quarter the size, which a momentum over batches of both tasks drowns in `P:`'s noise.
    """

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """What the sum of a step's nats is divided by: its completions, of all micro-batches and processes, times 32.

        transformers counts tokens here, in which accumulated batches of few tokens would weigh little.
        """
        rows = torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices:
            rows = self.accelerator.gather(rows).sum()
        return rows * NATS_SCALE


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


def train(stack: ExitStack) -> None:
    """All of the recipe; `stack` is closed when the process is done with the output folder."""
    with bad_input():
        recipe, args = parse_recipe((SFTRecipe, SFTConfig))
        hide_token(args)
        stack.enter_context(locked(args.output_dir, args.process_index == 0))
        if args.packing or args.padding_free:
            raise RecipeError(
                "packing, padding_free: the loss is a mean over rows, and these join them. Leave both out"
            )
        set_seed(args.seed)
        if recipe.init_from:
            tokenizer, model = load_tokenizer(recipe.init_from), load_model(recipe.init_from)
        else:
            tokenizer = build_nano_tokenizer() if recipe.tokenizer == "nano" else build_gpt2_tokenizer()
            model = new_model(recipe, tokenizer)
        others = load_others(model, recipe.average_with)
        rows, data_hash = load_rows(recipe, tokenizer, args.seed)
        order = args.seed if args.data_seed is None else args.data_seed
        rows = uniform_batches(rows, args.per_device_train_batch_size, order).remove_columns(["task", "length"])
    if recipe.optimizer == "muon":
        optimizer = (MuonFactory, {"muon_lr": recipe.muon_lr, "adamw_lr": args.learning_rate})
    else:
        optimizer = None
    trainer = RowLossTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, optimizer_cls_and_kwargs=optimizer
    )
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    average(model, others)
    trainer.save_model()
    facts = {"rows": len(rows), "data_sha256": data_hash, "seed": args.seed, "steps": trainer.state.global_step}
    facts |= {"data_seed": args.data_seed, "init_from": recipe.init_from, "average_with": recipe.average_with}
    Path(args.output_dir, "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    with ExitStack() as stack:
        run_program(partial(train, stack))


if __name__ == "__main__":
    main()
