"""From which size on is a rollout on the CPU faster over packed weights, the packing included?

    python benchmarks/packing.py [--samples 1 8 32] [--repeats 3]

Random GPT-2s of growing size, 4 prompts of 100 tokens, 40 tokens a completion, no end token; plain and packed in turn,
medians. The answer is `PACK_ABOVE` of `rookworld_trl/modeling/packing.py`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rookworld_trl.modeling import packing
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training.placement import keep_freed_memory

OUTPUT = Path(__file__).parent / "results" / "packing.json"
SIZES = [(4, 128, 4, 512), (6, 256, 4, 8000), (6, 384, 6, 16000), (8, 512, 8, 32000), (12, 768, 12, 50257)]


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
            seconds: dict[str, list[float]] = {"plain": [], "packed": []}
            for _ in range(arguments.repeats):
                for name, least in (("plain", 10**12), ("packed", 0)):
                    packing.PACK_ABOVE = least
                    start = time.perf_counter()
                    rollout(model, prompts, num_samples=samples, max_new_tokens=40, eos_token_id=None)
                    seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            row = {"parameters": model.num_parameters(), "rows": 4 * samples}
            row |= {"seconds": {name: round(value, 4) for name, value in medians.items()}}
            row |= {"speedup": round(medians["plain"] / medians["packed"], 2)}
            print(json.dumps(row), flush=True)
            results.append(row)
    report = {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
