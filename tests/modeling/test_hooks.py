"""Hooks act on compiled models, whose code does not look for them."""

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.hooks import hooked, install_position_hook


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_hooks_that_come_after_compiling(make_gpt2: Callable[..., GPT2LMHeadModel], backend: str) -> None:
    """The position hook is there before, one that scales the states and one that keeps them are not."""
    torch._dynamo.reset()
    model = make_gpt2()
    ids, mask = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(1)), torch.ones(2, 8).long()
    mask[0, :3] = 0
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = model.transformer(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        install_position_hook(model)
        compiled = torch.compile(model, backend=backend)

        def logits() -> torch.Tensor:
            return compiled(ids, attention_mask=mask).logits[mask.bool()]

        plain = logits()
        torch.testing.assert_close(plain, model.lm_head(states)[mask.bool()], atol=1e-5, rtol=0)

        def halve(_: object, __: object, output: object) -> object:
            output.last_hidden_state = output.last_hidden_state / 2
            return output

        kept: list[torch.Tensor] = []
        with hooked(model.transformer, lambda _, __, output: kept.append(output.last_hidden_state)):
            torch.testing.assert_close(logits(), plain, atol=1e-5, rtol=0)
        with hooked(model.transformer, halve):
            torch.testing.assert_close(logits(), plain / 2, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(kept[0][mask.bool()], states[mask.bool()], atol=1e-5, rtol=0)
    assert len(kept) == 1
