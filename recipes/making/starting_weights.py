"""Starting weights for a GPT-2 that learns chess in the nano tokenizer from nothing, in an hour and not in a day.

What an `A:` row asks is mostly looking up: the man on the square a move starts from, the same square of the old board.
A random start takes thousands of steps to find such look-ups. Here they are near from the first step:

* the first half of an embedding says which square a token names (half of it the square, a quarter each the file and
  the rank), and is the same for "⟨e4⟩P", " e4" and "e4"; the second half says what stands there or which end of a
  move it is, and holds the positions, as sinusoids;
* in half of the heads queries and keys start as the same projection of the first half, so that a token attends to
  tokens of its own square: the mimetic initialization of Trockman and Kolter (2023, arXiv 2305.09828) in a subspace.

It is a start and no constraint: every weight is trained.
"""

import math

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from rookworld_trl.modeling.tokenizer import MEN, SQUARES, square_token

EMBEDDING_STD = 0.07


@torch.no_grad()
def set_starting_weights(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, *, squares_named: bool) -> None:
    """Overwrite the weights of a new model, by torch's global generator.

    Block matrices start at 0.5/sqrt(fan_in), the two residual projections at a fifth of that; norms and biases stay.

    Args:
        model: one of any size; with named squares its width is a multiple of four.
        tokenizer: its vocabulary gives the embeddings' rows.
        squares_named: whether that is the nano tokenizer; otherwise embeddings are random over all dimensions,
            positions sinusoids over all of them, and no head is special.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".h." in name:
            residual = name.endswith("c_proj.weight")
            parameter.normal_(0.0, (0.1 if residual else 0.5) / math.sqrt(parameter.shape[0]))
    tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    half = tokens.shape[1] // 2 if squares_named else 0  # dimensions that name squares
    tokens.zero_()
    tokens[:, half:].normal_(0.0, EMBEDDING_STD)
    waves = tokens.shape[1] - half
    rates = torch.exp(torch.arange(0, waves, 2) * (-math.log(10_000.0) / waves))
    angles = torch.arange(len(positions))[:, None] * rates
    positions.zero_()
    positions[:, half:] = EMBEDDING_STD * torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    if squares_named:
        _name_squares(tokens, tokenizer.get_vocab(), half)
        for block in model.transformer.h:
            for head in range(model.config.n_head // 2):
                _attend_to_the_same_square(block.attn.c_attn.weight, head, model.config.n_head, half)


def _name_squares(tokens: torch.Tensor, vocabulary: dict[str, int], half: int) -> None:
    what = {man: torch.randn(tokens.shape[1] - half) for man in MEN}
    origin, target = torch.randn(2, tokens.shape[1] - half)
    files, ranks = torch.randn(2, 8, half // 4)
    for square in SQUARES:
        where = torch.cat([torch.randn(half - 2 * (half // 4)), files[ord(square[0]) - 97], ranks[int(square[1]) - 1]])
        names = {f" {square}": origin, square: target, **{square_token(square, man): what[man] for man in MEN}}
        for name, second in names.items():
            tokens[vocabulary[name]] = EMBEDDING_STD * torch.cat([where, second])


def _attend_to_the_same_square(projection: torch.Tensor, head: int, heads: int, half: int) -> None:
    """Set a head's queries and keys in GPT-2's joint matrix (H, 3H): equal on the squares' half, weak elsewhere."""
    width = projection.shape[0]
    size = width // heads
    basis = torch.linalg.qr(torch.randn(half, half))[0][:, :size]
    for start in (head * size, width + head * size):
        part = projection[:, start : start + size]
        part *= 0.3
        part[:half, : basis.shape[1]] = basis
