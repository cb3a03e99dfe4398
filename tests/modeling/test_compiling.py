"""Compiled blocks on shared prefixes: the numbers and gradients of eager ones, in few graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.forest import per_token_logps
from rookworld_trl.modeling.gpt2 import EAGER, GPT2, Blocks, compile_blocks, compiled_graphs, next_multiple
from tests.modeling.test_trees import loss_of, pad, ragged

GPT2Factory = Callable[..., GPT2LMHeadModel]


def scored(model: GPT2LMHeadModel, blocks: Blocks, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the gradient of a loss on both."""
    model.zero_grad()
    logps, entropies = per_token_logps(GPT2.sharing(model, blocks), *pad(ragged(seed)), 0.8, compute_entropy=True)
    loss_of(logps, entropies, torch.linspace(-1, 1, logps.numel()).view_as(logps)).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return logps.detach(), entropies.detach(), gradient


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_compiled_blocks_are_eager_ones(make_gpt2: GPT2Factory, backend: str, bf16: bool) -> None:
    torch._dynamo.reset()
    model = make_gpt2(std=0.05) if bf16 else make_gpt2()
    blocks = compile_blocks({"backend": backend, "dynamic": False})
    before = compiled_graphs()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        eager, compiled = scored(model, EAGER), scored(model, blocks)
    assert compiled_graphs() - before == 2, "one graph before and one after attention, for all layers"
    atol = 0.02 if bf16 else 1e-5
    for expected, found in zip(eager[:2], compiled[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)
    assert (compiled[2] - eager[2]).norm() < (0.03 if bf16 else 1e-5) * eager[2].norm()


@pytest.mark.parametrize(("dynamic", "bound"), [(False, 16), (None, 8), (True, 4)])
def test_graphs_are_few_however_many_shapes_come(
    make_gpt2: GPT2Factory, monkeypatch: pytest.MonkeyPatch, dynamic: bool | None, bound: int
) -> None:
    """Two functions, with and without gradients; static graphs stop at dynamo's limit of eight for each."""
    torch._dynamo.reset()
    monkeypatch.setattr("rookworld_trl.modeling.gpt2.MULTIPLE", 4)
    model, before = make_gpt2(), compiled_graphs()
    blocks = compile_blocks({"backend": "eager", "dynamic": dynamic})
    assert [next_multiple(n) for n in (1, 4, 5)] == [4, 4, 8]
    lengths = set()
    for seed in range(12):
        batch = pad(ragged(seed)[: 2 + seed])
        with torch.set_grad_enabled(seed % 2 == 0):
            found, _ = per_token_logps(GPT2.sharing(model, blocks), *batch)
            expected, _ = per_token_logps(GPT2.sharing(model), *batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        lengths.add(batch[1].sum().item() + batch[3].sum().item())
    assert len(lengths) > 8
    assert 0 < compiled_graphs() - before <= bound
