"""The position hook: padded rows score as unpadded ones, with and without a cache, and only where it is needed."""

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.hooks import install_position_hook, positions_from_mask
from tests.support.builders import random_gpt2


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return random_gpt2(vocab_size=23, n_positions=32, initializer_range=0.5).eval()


ROW = [5, 7, 11, 2, 19]
PADDED = [0, 0, 0, *ROW]
MASK = [0, 0, 0, 1, 1, 1, 1, 1]


def test_positions_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert positions_from_mask(mask, 2).tolist() == [[1, 2], [3, 4], [0, 0]]


def test_padding_shifts_the_logits_without_the_hook_and_not_with_it(model: GPT2LMHeadModel) -> None:
    ids, mask = torch.tensor([PADDED]), torch.tensor([MASK])
    with torch.no_grad():
        alone = model(torch.tensor([ROW])).logits
        shifted = model(ids, attention_mask=mask).logits[:, 3:]
        handle = install_position_hook(model)
        hooked = model(ids, attention_mask=mask).logits[:, 3:]
        handle.remove()
        removed = model(ids, attention_mask=mask).logits[:, 3:]
    assert (shifted - alone).abs().max() > 0.1
    assert (hooked - alone).abs().max() < 1e-5
    assert torch.equal(removed, shifted)


def test_mask_passed_by_position_is_seen(model: GPT2LMHeadModel) -> None:
    install_position_hook(model)
    with torch.no_grad():
        alone = model.transformer(torch.tensor([ROW])).last_hidden_state
        positional = model.transformer(torch.tensor([PADDED]), None, torch.tensor([MASK])).last_hidden_state
    assert (positional[:, 3:] - alone).abs().max() < 1e-5


def test_given_positions_win(model: GPT2LMHeadModel) -> None:
    positions = torch.tensor([[9, 9, 9, 4, 5, 6, 7, 8]])
    ids, mask = torch.tensor([PADDED]), torch.tensor([MASK])
    with torch.no_grad():
        before = model(ids, attention_mask=mask, position_ids=positions).logits
        install_position_hook(model)
        after = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(before, after)


def test_cached_step_continues_the_count(model: GPT2LMHeadModel) -> None:
    install_position_hook(model)
    with torch.no_grad():
        whole = model(torch.tensor([ROW])).logits[:, -1]
        cache = model(torch.tensor([PADDED[:-1]]), attention_mask=torch.tensor([MASK[:-1]]), use_cache=True)
        step = model(
            torch.tensor([ROW[-1:]]), attention_mask=torch.tensor([MASK]), past_key_values=cache.past_key_values
        ).logits[:, -1]
    assert (step - whole).abs().max() < 1e-5


def test_generate_is_unchanged(model: GPT2LMHeadModel) -> None:
    ids, mask = torch.tensor([PADDED, [*PADDED[3:], 1, 2, 3]]), torch.tensor([MASK, [1] * 8])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(ids, attention_mask=mask, **options)
    install_position_hook(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)


def test_a_backbone_without_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no `position_ids`"):
        install_position_hook(nn.Linear(2, 2))
