"""Does torch's fused attention pay in our own passes? Forward and backward against plain products, side by side.

    python -m benchmarks.attention [--device cpu] [--output FILE]

Of trees of prompts, completions and all legal moves, as the exact gradient and supervised training have them, in the
shapes of rookworld-nano and of 124M. Medians of five rounds in which both take turns; on a CPU with OMP_NUM_THREADS=1
by the process's own seconds, so that what else runs hardly counts.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, best_device, machine, own_clock, wait, write_report
from rookworld_trl.modeling import token_tree

OUTPUT = RESULTS / "attention.json"
SHAPES = {"nano": (4, 32), "124m": (12, 64)}  # heads, width of each
ROUNDS = 5
TREES = {"nano": (330, 325, 320, 315), "124m": (600, 595, 590, 580)}  # tokens, of two samples with all legal moves


def tree_pass(name: str, device: str) -> tuple[int, Any]:
    """Tokens, and attention over padded trees in which each token sees itself and some of those before it."""
    trees, rng = TREES[name], np.random.default_rng(0)
    size = max(trees)
    seen = np.tile(np.eye(size, dtype=bool), (len(trees), 1, 1))
    for mask, tokens in zip(seen, trees, strict=True):
        mask[:tokens, :tokens] |= np.tril(rng.random((tokens, tokens)) < 0.3)
    slots = np.flatnonzero(np.arange(size) < np.array(trees)[:, None])
    mask_and_slots = [torch.from_numpy(each).to(device) for each in (seen, slots)]
    return sum(trees), token_tree.packed_attention(*mask_and_slots, SHAPES[name][0])


def measure(name: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Seconds of both kinds of attention, and how far their results are apart."""
    heads, width = SHAPES[name]
    tokens, attend = tree_pass(name, device)
    torch.manual_seed(0)
    inputs = [torch.randn(tokens, heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    weights = torch.randn(tokens, heads, width, device=device, dtype=dtype)
    clock = own_clock(device)
    seconds: dict[str, dict[str, list[float]]] = {way: {"forward": [], "both": []} for way in ("plain", "fused")}
    results: dict[str, Tensor] = {}
    for _ in range(ROUNDS + 1):  # the first warms up
        for way, found in seconds.items():

            def choice(_: Tensor, way: str = way) -> bool:
                return way == "fused"

            with patch.object(token_tree, "fused_pays", choice):
                wait(device)
                start = clock()
                results[way] = attend(0, *inputs, width**-0.5)
                wait(device)
                middle = clock()
                torch.autograd.grad((results[way] * weights).sum(), inputs)
                wait(device)
                found["forward"].append(middle - start)
                found["both"].append(clock() - start)
    row: dict[str, Any] = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
    row["difference"] = (results["plain"] - results["fused"]).abs().max().item()
    for part in ("forward", "both"):
        plain, fused = (statistics.median(seconds[way][part][1:]) for way in ("plain", "fused"))
        row[part] = {"plain": round(plain, 5), "fused": round(fused, 5), "speedup": round(plain / fused, 2)}
    return row


def rows(device: str, names: Sequence[str] = tuple(SHAPES)) -> list[dict[str, Any]]:
    """Of each model's shapes and precision."""
    dtypes = (torch.float32, torch.bfloat16)
    return [measure(name, dtype, device) for name in names for dtype in dtypes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    found = rows(arguments.device)
    for row in found:
        print(row)
    write_report(arguments.output, {**machine(arguments.device), "results": found})


if __name__ == "__main__":
    main()
