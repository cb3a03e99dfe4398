"""Rows a second of supervised training on one core, three ways side by side.

    python -m benchmarks.supervised

The same rows go forward and backward through rookworld-nano, with bf16 products: `P:` rows of some positions and two
`A:` rows of each of others. `padded` is TRL's pass over transformers' model, a line for each row, rows of one task and
nearly one length in a batch. `trees` is the pass of `SupervisedTrainer` over the same rows, a tree for each position.
`recipe` is the same with the targets of `recipes/sft.py`: all legal moves and the shares of the good ones. Seconds are
the process's own time, in which others on the machine count less than by the clock. Beside them: operations a second,
as a share of what the core does in one large product.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chess
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import RESULTS, busy, machine, medians, write_report
from recipes.making.trees import MOVES_OF_POSITION, Words, environment_tree, policy_tree
from rookworld_trl.chess import policy
from rookworld_trl.chess.answers import environment_rows, policy_completion
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.loading import NANO, load
from rookworld_trl.modeling.row_tree import RowTree, pack, weighted_nats
from rookworld_trl.training.placement import keep_freed_memory

BATCH = 32
Row = tuple[list[int], list[int]]


def records(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Positions of random games with some of their moves as the best ones: how fast it goes does not ask how good."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        board = chess.Board()
        for _ in range(rng.randint(10, 80)):
            if board.is_game_over():
                break
            board.push(rng.choice(list(board.legal_moves)))
        moves = [move.uci() for move in board.legal_moves][: policy.MAX_CANDIDATES]
        history = " ".join(move.uci() for move in board.move_stack[-9:])
        if moves:
            values = sorted((rng.randint(-300, 300) for _ in moves), reverse=True)
            found.append({"fen": board.fen(), "history": history, "moves": moves, "cp": values, "played": moves[0]})
    return found


def product_speed() -> float:
    """Operations a second in one large bf16 product of the model's width."""
    x, weight = torch.randn(4096, 128).bfloat16(), torch.randn(128, 512).bfloat16()
    seconds = medians({"mm": lambda: torch.mm(x, weight)}, 50, clock=time.process_time)["mm"]
    return 2 * x.shape[0] * weight.numel() / seconds


def padded_pass(model: GPT2LMHeadModel, rows: Sequence[Row], pad: int) -> Callable[[], None]:
    """TRL's, in batches of nearly one length."""
    collate = DataCollatorForLanguageModeling(pad_token_id=pad)
    examples = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in rows]
    examples.sort(key=lambda example: len(example["input_ids"]))
    batches = [collate(examples[start : start + BATCH]) for start in range(0, len(examples), BATCH)]
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))

    def run() -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum()
            loss.backward()
        model.zero_grad()

    return run


def tree_pass(model: GPT2LMHeadModel, trees: Sequence[RowTree]) -> tuple[Callable[[], None], int]:
    """`SupervisedTrainer`'s, and the tokens that are computed."""
    arrays = [tree.arrays() for tree in trees]
    batches = [pack(arrays[start : start + BATCH]) for start in range(0, len(arrays), BATCH)]

    def run() -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss: Tensor = weighted_nats(GPT2.sharing(model), batch)
            loss.backward()
        model.zero_grad()

    return run, sum(len(batch["input_ids"]) for batch in batches)


def measure(positions: int, repeats: int) -> dict[str, Any]:
    """Both tasks, each side's rows a second."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model, tokenizer = load(NANO)
    other, _ = load(NANO)
    weights = sum(weight.numel() for name, weight in model.named_parameters() if ".h." in name)
    words, peak, report = Words(tokenizer), product_speed(), dict[str, Any]()
    for task in ("policy", "environment"):
        trees, shares, rows = list[RowTree](), list[RowTree](), list[Row]()
        for number, record in enumerate(records(positions, random.Random(task))):
            rng = random.Random(number)
            if task == "policy":
                completion = policy_completion(record["moves"], record["cp"], rng)
                texts = [(policy.prompt(record["fen"]), completion)]
            else:
                made = environment_rows(record, MOVES_OF_POSITION, False, rng)
                texts = [(row["prompt"], row["completion"]) for row in made]
            mine = [(words.prompt(prompt), [*words.text(text), words.eos]) for prompt, text in texts]
            tree = RowTree()
            for row in mine:
                tree.add(*row)
            trees.append(tree)
            rows += mine
            shares.append((policy_tree if task == "policy" else environment_tree)(record, words, rng))
        packed, tokens = tree_pass(model, trees)
        recipe, recipe_tokens = tree_pass(model, shares)
        sides = {"padded": padded_pass(other, rows, tokenizer.pad_token_id), "trees": packed, "recipe": recipe}
        seconds = medians(sides, repeats, clock=time.process_time)
        lengths = {"padded": sum(len(p) + len(c) for p, c in rows), "trees": tokens, "recipe": recipe_tokens}
        counts = {"padded": len(rows), "trees": len(rows), "recipe": sum(tree.rows for tree in shares)}
        report[task] = {
            name: {
                "rows_per_second": round(counts[name] / seconds[name], 1),
                "tokens_of_a_row": round(lengths[name] / counts[name], 1),
                "share_of_peak": round(6 * weights * lengths[name] / seconds[name] / peak, 3),
            }
            for name in sides
        }
        report[task]["speedup"] = round(seconds["padded"] / seconds["trees"], 2)
    report["busy_processes"] = busy()
    return {**machine("cpu"), "peak_gflops": round(peak / 1e9), "positions": positions, **report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=128, help="of each task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "supervised.json")
    args = parser.parse_args()
    report = measure(args.positions, args.repeats)
    write_report(args.output, report)
    print(report)


if __name__ == "__main__":
    main()
