"""How fast is learning on shared prefixes beside TRL's? Same weights, rows and micro-batches; in turn, medians.

    python -m benchmarks.learning
    python -m benchmarks.learning --model PATH --prompts 8 --samples 16

One run scores all rows by the reference without gradients, then by the policy with its backward pass, a micro-batch at
a time. TRL's side is the model's own padded forward pass with TRL's fused head and the position hook. Rows of a group
stand together on both sides. Tokens are random; two shapes: `policy`, prompts of 77 and completions of 25 tokens that
agree nowhere by design, and `environment`, prompts of 110 and completions of 40 tokens, 60 % of which are the same and
the others leave it somewhere. Counts CPU seconds on a CPU, so that other work on the machine does not show.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import RESULTS, machine, medians, write_report
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.modeling.positions import install_position_hook
from rookworld_trl.training import scoring

OUTPUT = RESULTS / "learning.json"
SHAPES = {"policy": (77, 25, 0.0), "environment": (110, 40, 0.6)}  # prompt, completion, share of equal completions
Score = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def random_model(layers: int, width: int, heads: int, vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"vocab_size": vocab_size, "n_positions": 256, "n_embd": width, "n_layer": layers, "n_head": heads}
    return GPT2LMHeadModel(GPT2Config(**shape, **ids)).eval()


def random_rows(vocab_size: int, prompts: int, samples: int, shape: tuple[int, int, float]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (prompts * samples, P + C); prompts lack 0 to 9 of P tokens, on the left."""
    generator = torch.Generator().manual_seed(0)
    prompt_length, length, equal = shape

    def tokens(*size: int) -> Tensor:
        return torch.randint(1, vocab_size, size, generator=generator)

    rows, masks = [], []
    for _ in range(prompts):
        prompt, truth = tokens(prompt_length), tokens(length)
        mask = torch.ones(prompt_length + length, dtype=torch.long)
        mask[: int(torch.randint(10, (), generator=generator))] = 0
        for _ in range(samples):
            completion = tokens(length)
            if equal:
                same = torch.rand((), generator=generator) < equal
                common = length if same else int(torch.randint(length, (), generator=generator))
                completion[:common] = truth[:common]
            rows.append(torch.cat([prompt, completion]) * mask)
            masks.append(mask)
    return torch.stack(rows), torch.stack(masks)


def stock(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-keep] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -keep:]


def shared(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    return scoring.score(1.0, model, ids, mask, keep, compute_entropy=torch.is_grad_enabled())[0]


def phase(
    score: Score, policy: nn.Module, reference: nn.Module, ids: Tensor, mask: Tensor, keep: int, rows: int
) -> None:
    chunks = list(zip(ids.split(rows), mask.split(rows), strict=True))
    with torch.no_grad():
        for chunk in chunks:
            score(reference, *chunk, keep)
    policy.zero_grad(set_to_none=True)
    for chunk in chunks:
        score(policy, *chunk, keep).mean().backward()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def measure(
    policy: GPT2LMHeadModel, prompts: int, samples: int, micro_batch: int, repeats: int, bf16: bool = False
) -> list[dict[str, Any]]:
    """Both sides at both shapes, on the policy's device."""
    device, reference, results = policy.device.type, copy.deepcopy(policy), []
    for model, outputs in ((policy, ("log_probs", "entropy")), (reference, ("log_probs",))):
        install_position_hook(model)
        add_fused_lm_head(model, outputs=outputs)
    gradients: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        ids, mask = random_rows(policy.config.vocab_size, prompts, samples, shape)
        batch = ids.to(device), mask.to(device), shape[1], micro_batch

        def run(side: str, score: Score, batch: tuple[Any, ...] = batch) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                phase(score, policy, reference, *batch)
            gradients[side] = gradient(policy)

        sides = {side: partial(run, side, score) for side, score in (("stock", stock), ("shared", shared))}
        seconds = medians(sides, repeats, device, time.process_time if device == "cpu" else time.perf_counter)
        difference = (gradients["shared"] - gradients["stock"]).norm() / gradients["stock"].norm()
        result = {
            "shape": name,
            "rows": len(ids),
            "seconds": {side: round(value, 4) for side, value in seconds.items()},
            "rows_per_second": {side: round(len(ids) / value) for side, value in seconds.items()},
            "speedup": round(seconds["stock"] / seconds["shared"], 2),
            "relative_gradient_difference": float(f"{difference.item():.2g}"),
        }
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a GPT-2; default: a random one of --size")
    size = {"nargs": 4, "default": [4, 128, 4, 512], "metavar": ("LAYERS", "WIDTH", "HEADS", "V")}
    parser.add_argument("--size", type=int, **size)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=64, help="rows of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="both sides under bf16 autocast")
    arguments = parser.parse_args()
    policy = load_model(arguments.model) if arguments.model else random_model(*arguments.size)
    sizes = (arguments.prompts, arguments.samples, arguments.micro_batch)
    results = measure(policy.to(arguments.device), *sizes, arguments.repeats, arguments.bf16)
    report = {
        "parameters": policy.num_parameters(),
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "micro_batch": arguments.micro_batch,
        "bf16_autocast": arguments.bf16,
        "device": arguments.device,
        **machine(arguments.device),
        "results": results,
    }
    write_report(OUTPUT, report)


if __name__ == "__main__":
    main()
