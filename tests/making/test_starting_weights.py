"""What the heads of a new nano model look at before it has learned anything."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recipes.making.starting_weights import set_starting_weights
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer

PROMPT = "A: rnbqkbnr/pppp1ppp/8/4p3/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2+g1f3+e2e4 e7e5 g1f3+"


def new_model(vocab_size: int, *, squares_named: bool) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, attn_implementation="eager")).eval()
    set_starting_weights(model, build_nano_tokenizer(), squares_named=squares_named)
    return model


def test_the_squares_of_a_move_look_at_themselves_on_the_board() -> None:
    tokenizer = build_nano_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        heads = new_model(len(tokenizer), squares_named=True)(ids, output_attentions=True).attentions[0][0]
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    origin, board = tokens.index("g1"), tokens.index("⟨g1⟩N")  # of "+g1f3+", and where the knight stands
    for head in (0, 1):
        seen = heads[head, origin, :origin]
        assert seen.argmax() == board
        assert seen[board] > 10 * seen.median()


def test_another_tokenizer_gets_no_squares() -> None:
    model = new_model(300, squares_named=False)
    tokens = model.transformer.wte.weight
    assert tokens.std().item() == pytest.approx(0.07, rel=0.05)
    assert tokens[:, :64].abs().sum() > 0
    assert torch.isfinite(model.transformer.wpe.weight).all()
    assert model.transformer.wpe.weight.abs().max().item() == pytest.approx(0.07, rel=1e-3)
