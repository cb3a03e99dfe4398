"""From which size on is a rollout on the CPU faster over packed weights, the packing included?

    python -m benchmarks.packing [--samples 1 8 32] [--repeats 3]

Random GPT-2s of growing size, 4 prompts of 100 tokens, 40 tokens a completion, no end token; plain and packed in turn,
medians. The answer is `PACK_ABOVE` of `rookworld_trl/modeling/packing.py`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import RESULTS, machine, medians, write_report
from rookworld_trl.modeling import packing
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training.placement import keep_freed_memory

OUTPUT = RESULTS / "packing.json"
SIDES = {"plain": 10**12, "packed": 0}  # PACK_ABOVE
SIZES = [(4, 128, 4, 512), (6, 256, 4, 8000), (6, 384, 6, 16000), (8, 512, 8, 32000), (12, 768, 12, 50257)]


def sample(model: GPT2LMHeadModel, prompts: list[list[int]], samples: int, least: int) -> None:
    packing.PACK_ABOVE = least
    rollout(model, prompts, num_samples=samples, max_new_tokens=40, eos_token_id=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    keep_freed_memory()  # as the trainer does
    results = []
    for layers, width, heads, words in SIZES:
        torch.manual_seed(0)
        sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": words, "n_positions": 256}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
        prompts = [torch.randint(words, (100,)).tolist() for _ in range(4)]
        for samples in arguments.samples:
            sides = {name: partial(sample, model, prompts, samples, least) for name, least in SIDES.items()}
            seconds = medians(sides, arguments.repeats)
            row = {"parameters": model.num_parameters(), "rows": 4 * samples}
            row |= {"seconds": {name: round(value, 4) for name, value in seconds.items()}}
            row |= {"speedup": round(seconds["plain"] / seconds["packed"], 2)}
            print(json.dumps(row), flush=True)
            results.append(row)
    write_report(arguments.output, {**machine("cpu"), "results": results})


if __name__ == "__main__":
    main()
