"""What the exact gradient leaves out: the effect of a choice on the decision points behind it, estimated by sampling.

    python -m benchmarks.later_effects [--prompts 24] [--samples 32] [--model nano]

With the terms J_k of a completion's decision points (each with its weight, as `rewards/decisions.py` gives them), the
whole gradient of E[sum_k J_k] is the sum of a part that is computed, sum_k grad J_k, and of one that is left out: for
each sampled token, the log-prob's gradient times the J_k of the decision points behind it. Both are averaged over many
samples of `P:` prompts, the second with the mean of the prompt's other samples as its baseline (leave-one-out).

Both are noisy, so norms and angles come from products of two independent halves of the samples: the noise has mean 0 in
them. Standard errors by a jackknife over groups of prompts. Determined tokens take no part, and no J is divided by its
deviation (`scale_rewards: none`): with a deviation that depends on the prefix there is no objective to take apart.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, machine, padded, shipped, write_report
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.loading import load
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.rewards.decisions import ChessPoints
from rookworld_trl.training.exact import score_tree
from rookworld_trl.training.points import Points

TEMPERATURE, TOKENS = 0.7, 80
GROUPS = 8
PARTS = ("computed", "left out")


def credit(terms: Sequence[Sequence[float]], positions: Sequence[Sequence[int]], lengths: Sequence[int]) -> np.ndarray:
    """What stands behind each token of each sample, minus what stands there in the prompt's other samples, (N, C).

    A decision point that a sample does not reach (it has left the format) earns 0 and counts for all of its tokens.

    Args:
        terms: J of each sample's decision points, in their order.
        positions: completion tokens before each of them.
        lengths: tokens of each sample.
    """
    slots, samples = max(map(len, terms)), len(terms)
    earned, at = np.zeros((samples, slots)), np.tile(np.asarray(lengths)[:, None], slots)
    for row, (values, places) in enumerate(zip(terms, positions, strict=True)):
        earned[row, : len(values)], at[row, : len(values)] = values, places
    advantage = (earned - earned.mean(0)) * samples / (samples - 1)  # from the mean of the others
    tokens = np.arange(max(lengths))
    return np.einsum("nk,nkc->nc", advantage, (tokens < at[:, :, None]).astype(float))


def gradients(model: Any, tokenizer: Any, row: dict[str, Any], samples: int, seed: int) -> Tensor:
    """Means over a prompt's samples of both parts' gradients, of each half of them: (halves, parts, weights)."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    sampled = rollout(
        model,
        [prompt],
        num_samples=2 * samples,
        max_new_tokens=TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        temperature=TEMPERATURE,
        seed=seed,
    ).completion_ids
    find, halves = ChessPoints(tokenizer), []
    for half in (sampled[:samples], sampled[samples:]):
        moves = [[each for each in find(row, ids)["decisions"] if "otherwise" not in each] for ids in half]
        points = [Points.read({"decisions": each}) for each in moves]  # without what only holds the format
        batch = padded([prompt] * samples, half)
        passed, head = GPT2.sharing(model), model.get_output_embeddings()
        scored = score_tree(passed, head, batch, points, TEMPERATURE, scale=False)
        values = scored.objective.detach().numpy()
        places = [[decision.position for decision in each.decisions] for each in points]
        terms = [[float(values[n, at]) for at in each] for n, each in enumerate(places)]
        behind = torch.tensor(credit(terms, places, list(map(len, half))), dtype=torch.float)
        sides = [scored.objective.sum() / samples, (behind * scored.logps).sum() / samples]
        parts = []
        for number, side in enumerate(sides):
            grads = torch.autograd.grad(side, list(model.parameters()), retain_graph=not number, allow_unused=True)
            parts.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
        halves.append(torch.stack(parts))
    return torch.stack(halves)


def products(halves: Tensor) -> dict[str, float]:
    """Of (halves, parts, weights): norms and angles without the noise's share, and the noise of one half."""
    first, second = halves.double()
    across = (first @ second.T + second @ first.T) / 2  # between independent halves
    computed, out, both = across[0, 0].item(), across[1, 1].item(), across[0, 1].item()
    whole = computed + 2 * both + out
    difference = first - second
    noise = (difference.square().sum(1) / 4).sqrt()  # of the mean of both halves

    def cosine(product: float, one: float, two: float) -> float:
        return product / max(one * two, 1e-30) ** 0.5 if one > 0 and two > 0 else float("nan")

    return {
        "cosine of computed and whole": cosine(computed + both, computed, whole),
        "left out / whole": max(out / whole, 0.0) ** 0.5 if whole > 0 else float("nan"),
        "left out / computed": max(out / computed, 0.0) ** 0.5,
        "cosine of computed and left out": cosine(both, computed, out),
        "noise of computed / its norm": noise[0].item() / max(computed, 1e-30) ** 0.5,
        "noise of left out / its norm": noise[1].item() / max(out, 1e-30) ** 0.5,
        "cosine of the halves, computed": torch.cosine_similarity(first[0], second[0], dim=0).item(),
        "cosine of the halves, whole": torch.cosine_similarity(first.sum(0), second.sum(0), dim=0).item(),
    }


def measure(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """`products` of the mean over the prompts, each with its jackknife's standard error over groups of them."""
    sums: list[Tensor] = []
    for group in range(GROUPS):
        own = rows[group::GROUPS]
        of_group = [gradients(model, tokenizer, row, samples, 1) for row in own]
        sums.append(torch.stack(of_group).sum(0))
        print(f"{group + 1} of {GROUPS} groups", flush=True)
    total = torch.stack(sums).sum(0)
    found = products(total / len(rows))
    without = [products(total - each) for each in sums]
    return {
        name: {
            "value": value,
            "standard_error": float(
                np.sqrt((GROUPS - 1) / GROUPS * sum((each[name] - value) ** 2 for each in without))
            ),
        }
        for name, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=32, help="of each half")
    parser.add_argument("--model", default="nano")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    rows = [row for row in shipped("train").select(range(400)) if row["task"] == "policy"][: arguments.prompts]
    settings = {"prompts": len(rows), "samples": 2 * arguments.samples, "temperature": TEMPERATURE}
    report: dict[str, Any] = {"model": arguments.model, **settings, **machine("cpu")}
    report["results"] = measure(model, tokenizer, rows, arguments.samples)
    write_report(RESULTS / "later_effects.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
