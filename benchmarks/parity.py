"""How exact is the code that samples and scores? Its errors over those of transformers' own forward pass, as a table.

    python benchmarks/parity.py [--models 124m PATH ...] [--output benchmarks/results/parity.json]

Errors are largest absolute distances from transformers' model in float64, on the same weights. Float32 errors grow with
the model's logits, and those of transformers grow alike: a ratio near 1 is rounding.
What is measured is what a run uses: prefill, decoding behind shared prefixes, scoring with shared prefixes and its
gradients, and whole rollouts, drafted or not. (On a CPU, models as large as 124M sample over packed weights.)

`124m` is GPT-2 small with random weights (124,439,808 parameters); a path is the folder of a saved model. Without
--models: both, where the package ships its small model. Fails when a ratio exceeds the limit.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import rookworld_trl
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.loading import load_model
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.shared_prefix import SharedPrefixDecoder, prefill
from rookworld_trl.modeling.shared_scoring import per_token_logps

SHIPPED = Path(rookworld_trl.__file__).parent / "assets" / "nano"
OUTPUT = Path(__file__).parent / "results" / "parity.json"
GROUPS, SAMPLES, LENGTH, NEW_TOKENS = 4, 2, 32, 16
# Sums in another order: among the largest of some hundred rounding errors twice is common, a hundred times is a fault.
LIMIT = 4.0


def random_gpt2_small() -> GPT2LMHeadModel:
    """GPT-2 small, random; norms and biases are off their starting values so that they count."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert model.num_parameters() == 124_439_808
    return model


def completion_logps(model: nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """By transformers, row by row without padding, joined."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(rows)


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, with two columns of padding more than needed."""
    width = max(map(len, rows)) + 2
    cells = [[(0, 0)] * (width - len(row)) * left + [(id, 1) for id in row] for row in rows]
    table = torch.tensor([row + [(0, 0)] * (width - len(row)) for row in cells])
    return table[..., 0], table[..., 1]


def gap(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


def measure(model: GPT2LMHeadModel) -> dict[str, dict[str, float]]:
    """For each part the error of ours, that of transformers, and their ratio."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, found = model.config.vocab_size, dict[str, dict[str, float]]()
    ids = torch.randint(vocabulary, (GROUPS, LENGTH + NEW_TOKENS), generator=generator)
    prompts = [row[: LENGTH - 5 * i] for i, row in enumerate(ids.tolist()) for _ in range(SAMPLES)]
    exact_model, ours = copy.deepcopy(model).double(), GPT2.sharing(model)

    def compare(what: str, mine: Tensor, theirs: Tensor, exact: Tensor) -> None:
        errors = gap(mine, exact), gap(theirs, exact)
        found[what] = {"ours": errors[0], "transformers": errors[1], "ratio": errors[0] / errors[1]}

    with torch.no_grad():
        exact, theirs = exact_model(ids).logits, model(ids).logits
        compare("prefill: logits", ours.logits(prefill(ours, ids.tolist())[1]), theirs, exact)
        prefix, _ = prefill(ours, ids[:, :LENGTH].tolist())
        starts = torch.full((GROUPS,), LENGTH)
        decoder = SharedPrefixDecoder(ours, prefix, torch.arange(GROUPS), starts, NEW_TOKENS)
        steps = [decoder.forward(ids[decoder.source, i : i + 1]) for i in range(LENGTH, LENGTH + NEW_TOKENS)]
        found_logits = ours.logits(torch.stack(steps, 1))
        compare("decoding: logits", found_logits, theirs[:, LENGTH:], exact[:, LENGTH:])
        with torch.autocast("cpu", torch.bfloat16):
            low, rounded = ours.logits(prefill(ours, ids.tolist())[1]), model(ids).logits
        compare("prefill: logits, bf16 autocast", low, rounded, exact)
        settings = {"num_samples": SAMPLES, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
        plain = rollout(model, prompts[::SAMPLES], **settings)
        drafts = [[*row[: NEW_TOKENS // 2], 0] for row in plain.completion_ids[::SAMPLES]]
        drafted = rollout(model, prompts[::SAMPLES], drafts=drafts, **settings)
        for name, sampled in (("", plain), (", drafted", drafted)):
            exact, theirs = (completion_logps(each, prompts, sampled.completion_ids) for each in (exact_model, model))
            compare(f"rollouts: log-probs{name}", torch.tensor(sampled.logps).flatten(), theirs, exact)
    scored, mask = padded(plain.completion_ids, left=False)
    parameters = [list(each.parameters()) for each in (model, model, exact_model)]
    logps, _ = per_token_logps(ours, *padded(prompts, left=True), scored, mask)
    values = [
        logps[mask.bool()],
        *(completion_logps(each, prompts, plain.completion_ids) for each in (model, exact_model)),
    ]
    compare("scoring: log-probs", *(each.detach() for each in values))
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value.mean(), weights)])
        for value, weights in zip(values, parameters, strict=True)
    ]
    compare("scoring: gradients", *gradients)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["124m", *([str(SHIPPED)] if SHIPPED.is_dir() else [])])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    report, within = [], True
    for name in arguments.models:
        model = random_gpt2_small() if name == "124m" else load_model(name)
        label = f"{Path(name).name}, {model.num_parameters():,} parameters"
        print(f"{label}\n{'largest absolute error':<34}{'ours':>10}{'transformers':>14}{'ratio':>8}{'limit':>7}")
        found = measure(model)
        for what, value in found.items():
            bad = not value["ratio"] <= LIMIT
            within &= not bad
            numbers = f"{value['ours']:>10.1e}{value['transformers']:>14.1e}{value['ratio']:>8.2f}{LIMIT:>7.1f}"
            print(f"{what:<34}{numbers}{'  <-- too large' if bad else ''}")
        report.append({"model": label, "torch": torch.__version__, "errors": found})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"limit": LIMIT, "models": report}, indent=1) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
