"""Packed weights give the same function, are packed for every rollout, and only where that pays."""

from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling import packing
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.shared_prefix import prefill
from tests.support.builders import random_gpt2

PROMPTS = [[5, 6, 7], [9], [11, 3, 4, 8, 2]]


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return random_gpt2(vocab_size=97, n_embd=48, n_head=3).eval()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pack small weights too; how many were packed."""
    packed: list[int] = []
    pack = packing.pack
    monkeypatch.setattr(packing, "PACK_ABOVE", 0)

    def counted(weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() > 6:  # not the probe of `available`
            packed.append(weight.numel())
        return pack(weight)

    monkeypatch.setattr(packing, "pack", counted)
    return packed


def sample(model: GPT2LMHeadModel, **changes: Any) -> Any:
    settings = {"num_samples": 4, "max_new_tokens": 20, "eos_token_id": None, "seed": 3, **changes}
    return rollout(model, PROMPTS, **settings)


def test_this_build_can_pack() -> None:
    assert packing.available()


def test_the_function_stays_the_same(model: GPT2LMHeadModel, always: list[int]) -> None:
    plain = GPT2.sharing(model)
    packed = plain.for_decoding(20)
    assert packed is not plain
    assert plain._packed_head is None, "the one it was made from stays as it was"
    ids = torch.randint(97, (3, 17))
    with torch.no_grad():
        for rows in (ids, ids[:1, :1]):
            _, hidden = prefill(packed, rows.tolist())
            torch.testing.assert_close(packed.logits(hidden), model(rows).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_and_log_probs_stay_the_same(
    model: GPT2LMHeadModel, always: list[int], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    packed = sample(model, temperature=temperature)
    drafted = sample(model, temperature=temperature, drafts=packed.completion_ids[::4])
    assert len(always) == 2 * 9
    monkeypatch.setattr(packing, "PACK_ABOVE", 10**12)
    plain = sample(model, temperature=temperature)
    assert len(always) == 2 * 9
    assert packed.completion_ids == plain.completion_ids == drafted.completion_ids
    for one in (packed, drafted):
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(plain.logps), atol=1e-5, rtol=0)


def test_the_next_rollout_sees_new_weights(model: GPT2LMHeadModel, always: list[int]) -> None:
    before = sample(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert sample(model).completion_ids != before.completion_ids


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_where_packing_does_not_pay(model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def packs(max_new_tokens: int = 20, weights: GPT2LMHeadModel = model) -> bool:
        return GPT2.sharing(weights).for_decoding(max_new_tokens)._packed_head is not None

    assert not packs(), "a small model"
    monkeypatch.setattr(packing, "PACK_ABOVE", 0)
    assert packs()
    assert not packs(max_new_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert not packs()
    assert not packs(weights=GPT2LMHeadModel(model.config).to(torch.bfloat16))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packs()
    monkeypatch.setattr(packing, "packed_affine", lambda x, packed, bias: packed.no_such_operator)
    assert not packs(), "a build without the operator"
