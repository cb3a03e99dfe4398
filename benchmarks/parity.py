"""How exact is the code that samples and scores? Its errors over those of transformers' own forward pass, as a table.

    python -m benchmarks.parity [--models 124m PATH ...] [--device cuda] [--output benchmarks/results/parity.json]

Errors are largest absolute distances from transformers' model in float64, on the same weights; first in float32, then
under bf16 autocast. They grow with the model's logits, and those of transformers grow alike: ratios near 1 are
rounding.
What is measured is what a run uses: prefill, decoding behind shared prefixes, scoring with shared prefixes and its
gradients, and whole rollouts, drafted or not.

`124m` is GPT-2 small with random weights (124,439,808 parameters); a path is the folder of a saved model. Without
--models: both, where the package ships its small model. Fails when a ratio exceeds the limit.
"""

import argparse
import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import RESULTS, best_device, machine, write_report
from rookworld_trl.modeling.forest import per_token_logps
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.loading import NANO_FOLDER, load_model
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.shared_prefix import SharedPrefixDecoder, prefill

OUTPUT = RESULTS / "parity.json"
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
        logits = model(torch.tensor([prompt + completion], device=model.device)).logits[0, len(prompt) - 1 : -1]
        tokens = torch.tensor(completion, device=model.device)
        rows.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return torch.cat(rows)


def padded(rows: list[list[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, with two columns of padding more than needed."""
    width = max(map(len, rows)) + 2
    cells = [[(0, 0)] * (width - len(row)) * left + [(id, 1) for id in row] for row in rows]
    table = torch.tensor([row + [(0, 0)] * (width - len(row)) for row in cells], device=device)
    return table[..., 0], table[..., 1]


def gap(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


def measure(model: GPT2LMHeadModel, mixed: bool = False) -> dict[str, dict[str, float]]:
    """For each part the error of ours, that of transformers, and their ratio; on the model's device.

    Args:
        mixed: both under bf16 autocast.
    """
    generator, device = torch.Generator().manual_seed(1), model.device
    vocabulary, found = model.config.vocab_size, dict[str, dict[str, float]]()
    ids = torch.randint(vocabulary, (GROUPS, LENGTH + NEW_TOKENS), generator=generator)
    prompts = [row[: LENGTH - 5 * i] for i, row in enumerate(ids.tolist()) for _ in range(SAMPLES)]
    ids = ids.to(device)
    exact_model, ours = copy.deepcopy(model).double(), GPT2.sharing(model)

    def rounded() -> torch.autocast | nullcontext:
        return torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()

    def compare(what: str, mine: Tensor, theirs: Tensor, exact: Tensor) -> None:
        errors = gap(mine, exact), gap(theirs, exact)
        found[what] = {"ours": errors[0], "transformers": errors[1], "ratio": errors[0] / errors[1]}

    with torch.no_grad():
        exact = exact_model(ids).logits
        with rounded():
            theirs = model(ids).logits
            whole = ours.logits(prefill(ours, ids.tolist())[1])
            prefix, _ = prefill(ours, ids[:, :LENGTH].tolist())
            source = torch.arange(GROUPS, device=device)
            starts = torch.full((GROUPS,), LENGTH, device=device)
            decoder = SharedPrefixDecoder(ours, prefix, source, starts, NEW_TOKENS)
            steps = [decoder.forward(ids[decoder.source, i]) for i in range(LENGTH, LENGTH + NEW_TOKENS)]
            decoded = ours.logits(torch.stack(steps, 1))
            settings = {"num_samples": SAMPLES, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
            plain = rollout(model, prompts[::SAMPLES], **settings)
            drafts = [[*row[: NEW_TOKENS // 2], 0] for row in plain.completion_ids[::SAMPLES]]
            drafted = rollout(model, prompts[::SAMPLES], drafts=drafts, **settings)
        compare("prefill: logits", whole, theirs, exact)
        compare("decoding: logits", decoded, theirs[:, LENGTH:], exact[:, LENGTH:])
        for name, sampled in (("", plain), (", drafted", drafted)):
            with rounded():
                theirs = completion_logps(model, prompts, sampled.completion_ids)
            exact = completion_logps(exact_model, prompts, sampled.completion_ids)
            compare(f"rollouts: log-probs{name}", torch.tensor(sampled.logps, device=device).flatten(), theirs, exact)
    scored, mask = padded(plain.completion_ids, False, device)
    with rounded():
        logps, _ = per_token_logps(ours, *padded(prompts, True, device), scored, mask)
        theirs = completion_logps(model, prompts, plain.completion_ids)
    values = logps[mask.bool()], theirs, completion_logps(exact_model, prompts, plain.completion_ids)
    compare("scoring: log-probs", *(each.detach() for each in values))
    parameters = [list(each.parameters()) for each in (model, model, exact_model)]
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value.mean(), weights)])
        for value, weights in zip(values, parameters, strict=True)
    ]
    compare("scoring: gradients", *gradients)
    return found


def table(label: str, found: dict[str, dict[str, float]]) -> bool:
    """Print what `measure` found; whether all of it is within the limit."""
    print(f"{label}\n{'largest absolute error':<34}{'ours':>10}{'transformers':>14}{'ratio':>8}{'limit':>7}")
    for what, value in found.items():
        numbers = f"{value['ours']:>10.1e}{value['transformers']:>14.1e}{value['ratio']:>8.2f}{LIMIT:>7.1f}"
        print(f"{what:<34}{numbers}{'' if value['ratio'] <= LIMIT else '  <-- too large'}")
    return all(value["ratio"] <= LIMIT for value in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["124m", str(NANO_FOLDER)])
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    report, within = [], True
    for name in arguments.models:
        model = (random_gpt2_small() if name == "124m" else load_model(name)).to(arguments.device)
        for precision in ("float32", "bf16"):
            label = f"{Path(name).name}, {model.num_parameters():,} parameters, {precision}"
            found = measure(model, mixed=precision == "bf16")
            within &= table(label, found)
            report.append({"model": label, "errors": found})
    write_report(arguments.output, {"limit": LIMIT, **machine(arguments.device), "models": report})
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
