"""Small random GPT-2s, made on the spot."""

from collections.abc import Callable

import pytest
from transformers import GPT2LMHeadModel

from tests.support.builders import random_gpt2


@pytest.fixture(scope="session")
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Builds a GPT-2 of 3 layers x 32 whose distributions are far from flat; takes any field of its config."""

    def make(seed: int = 0, std: float = 0.15, **fields: object) -> GPT2LMHeadModel:
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return random_gpt2(seed, std, **{"vocab_size": 61, "n_layer": 3, "n_head": 4, **special, **fields}).eval()

    return make
