"""The one place where tiny tokenizers and random GPT-2s are built; no fixtures, so that subprocesses can use it too."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CHARACTERS = "".join(sorted(set(" +-./:0123456789ABEKMNPQRabcdefghknpqrw")))  # of both tasks' texts


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, behind `<pad>` 0, `<eos>` 1 and `<unk>` 2."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()  # without it, decode() puts a space between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>"
    )


def random_gpt2(seed: int = 0, noise: float = 0.0, **fields: Any) -> GPT2LMHeadModel:
    """A GPT-2 of 2 layers x 32 over `character_tokenizer`.

    Args:
        noise: deviation of what is added to every parameter, biases and norms too: a test would not miss them at 0.
        fields: of `GPT2Config`, in place of these.
    """
    sizes = {"vocab_size": 3 + len(CHARACTERS), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **special, **fields}))
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
    return model
