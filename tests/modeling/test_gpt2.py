"""The plain GPT-2, as rollouts run it, against transformers' implementation: outputs, decoding, strictness.

Padding and gradients are the business of `test_trees`.
"""

import copy
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.shared_prefix import SharedPrefixDecoder, prefill

GPT2Factory = Callable[..., GPT2LMHeadModel]


@pytest.fixture
def model(make_gpt2: GPT2Factory) -> GPT2LMHeadModel:
    return make_gpt2()


def token_ids(rows: int, length: int, vocab_size: int = 61, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(gpt2: GPT2, ids: Tensor) -> Tensor:
    """As rollouts compute them over a prompt and its draft."""
    return gpt2.logits(prefill(gpt2, ids.tolist())[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_logits_agree(make_gpt2: GPT2Factory, activation: str, attention: str) -> None:
    model = make_gpt2(activation_function=activation, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    ids = token_ids(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(logits(GPT2.sharing(model), ids), model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{"n_inner": 48}, {"layer_norm_epsilon": 1e-2}, {"n_head": 1}])
def test_logits_agree_for_every_field_that_matters(make_gpt2: GPT2Factory, fields: dict[str, object]) -> None:
    model, plain = make_gpt2(**fields), make_gpt2()
    ids = token_ids(2, 16)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(logits(GPT2.sharing(model), ids), expected, atol=1e-5, rtol=0)
        assert (expected - plain(ids).logits).abs().max() > 1e-3, "the field changes nothing: the test is blind"


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bf16_agrees_within_its_rounding(model: GPT2LMHeadModel, mode: str) -> None:
    ids = token_ids(4, 12)
    exact = model(ids).logits
    low = copy.deepcopy(model).to(torch.bfloat16) if mode == "weights" else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        ours, theirs = logits(GPT2.sharing(low), ids).float(), low(ids).logits.float()
    rounding = (theirs - exact).abs().max()  # what bf16 itself costs
    assert (ours - exact).abs().max() < 2 * rounding
    assert (ours - theirs).abs().max() < 2 * rounding


def test_decoding_equals_the_full_forward(model: GPT2LMHeadModel) -> None:
    """Prompts of different lengths, then token by token behind them."""
    ids, starts = token_ids(4, 14), [3, 7, 5, 6]
    gpt2 = GPT2.sharing(model)
    with torch.no_grad():
        full = model(ids).logits
        prefix, _ = prefill(gpt2, [row[:start] for row, start in zip(ids.tolist(), starts, strict=True)])
        decoder = SharedPrefixDecoder(gpt2, prefix, torch.arange(4), torch.tensor(starts), capacity=7)
        for done in range(7):
            places = [start + done for start in starts]
            tokens = ids[torch.arange(4), places]
            found = gpt2.logits(decoder.forward(tokens[decoder.source]))
            torch.testing.assert_close(found, full[torch.arange(4), places], atol=1e-5, rtol=0)


def test_parameters_are_shared_not_copied(model: GPT2LMHeadModel) -> None:
    gpt2, ids = GPT2.sharing(model), token_ids(2, 8)
    own = {tensor.data_ptr() for layer in gpt2.layers for tensor in layer} | {gpt2.wte.data_ptr(), gpt2.wpe.data_ptr()}
    assert own | {gpt2.ln_f_weight.data_ptr(), gpt2.ln_f_bias.data_ptr()} == {p.data_ptr() for p in model.parameters()}
    before = logits(gpt2, ids)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    torch.testing.assert_close(logits(gpt2, ids), model(ids).logits, atol=1e-5, rtol=0)
    assert (logits(gpt2, ids) - before).abs().max() > 1e-2


def test_wrong_weights_are_refused(model: GPT2LMHeadModel) -> None:
    weights = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"plain GPT-2: lm_head\.weight, transformer\.h\.1\.ln_1\.bias missing or unknown"
    ):
        GPT2(model.config, {"lm_head.weight": weights.pop("transformer.h.1.ln_1.bias"), **weights})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt_neo"),
        ("activation_function", "gelu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("reorder_and_upcast_attn", True),
        ("tie_word_embeddings", False),
        ("n_head", 5),
    ],
)
def test_unsupported_configs_are_refused_by_name(model: GPT2LMHeadModel, field: str, value: object) -> None:
    config = copy.deepcopy(model.config)
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=field):
        GPT2(config, dict(model.named_parameters()))


def test_adapters_are_refused(model: GPT2LMHeadModel) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="merge_and_unload"):
        GPT2.sharing(adapted)


def test_the_shipped_model_is_as_exact_as_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make parity` on rookworld-nano; and its program sees a fault: keys scaled wrongly by a ten-thousandth."""
    parity = runpy.run_path("benchmarks/parity.py")
    command = ["parity", "--models", str(parity["NANO_FOLDER"]), "--output", str(tmp_path / "parity.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert parity["main"]() == 0
    construct = GPT2.__init__

    def scaled(self: GPT2, *args: object) -> None:
        construct(self, *args)
        self.scale *= 1.0001

    monkeypatch.setattr(GPT2, "__init__", scaled)
    assert parity["main"]() == 1
