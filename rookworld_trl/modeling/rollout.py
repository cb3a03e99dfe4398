"""Native rollouts: sampling completions from the live parameters of a GPT-2, with nothing to copy or synchronise.

What makes them fast: each distinct prompt is passed once, and all its samples attend to that one copy of its keys and
values (shared-prefix attention, as in Juravsky et al. 2024, "Hydragen", arXiv 2402.05099); only what a sample adds
itself is cached by sample. Finished samples are compacted away while the others go on. Where a completion can be
guessed, its draft saves most of the passes (see `sample_batch`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.sample_batch import SampleBatch, SampleRequest, Settings


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completions, prompt-major: sample j of prompt i stands at `i * num_samples + j`.

    Attributes:
        completion_ids: tokens of each completion, the end token included where it was produced.
        logps: natural log-prob of each of those tokens under the distribution it was sampled from (temperature and
            filters included); for greedy decoding, under the model itself.
    """

    completion_ids: list[list[int]]
    logps: list[list[float]]


@torch.no_grad()
def rollout(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    eos_token_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    drafts: Sequence[Sequence[int] | None] | None = None,
) -> Rollout:
    """Sample `num_samples` completions of each prompt.

    A sample depends on the weights, the seed, its prompt and its number among that prompt's samples, and on nothing
    else in the batch (up to rounding of the logits). A prompt listed twice has its samples numbered through, so its
    copies differ. The model's mode and dropout do not matter and are left as they are. Under `torch.autocast` the
    matrix products run in its dtype, as they do in training.

    Args:
        model: transformers `GPT2LMHeadModel`, whose parameters are used in place.
        prompt_ids: token ids of each prompt, without padding; lengths may differ.
        max_new_tokens: tokens at most in a completion.
        eos_token_id: the token that ends a completion; None: all run to `max_new_tokens`.
        temperature: 0 for greedy decoding.
        top_k: 0 for no limit.
        top_p: 1 for no limit.
        batch_size: samples drawn at the same time; None: all.
        drafts: for each prompt the completion to expect, its end token included, or None. The samples are the same with
            any draft; the better it is, the sooner they are there.

    Raises:
        ValueError: an unsupported model, a prompt that is empty or leaves no room for `max_new_tokens`, or a sampling
            setting out of its range.
    """
    settings = Settings(max_new_tokens, eos_token_id, temperature, top_k, top_p, seed)
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: use at least 1")
    if drafts is not None and len(drafts) != len(prompt_ids):
        raise ValueError(f"{len(drafts)} drafts for {len(prompt_ids)} prompts: give one for each, or None")
    gpt2 = GPT2.sharing(model)
    for what, sequences in (("prompt", prompt_ids), ("draft", drafts or [])):
        _check_tokens(what, sequences, gpt2.config.vocab_size)
    _check_lengths(prompt_ids, gpt2.config.n_positions - max_new_tokens)
    rows = len(prompt_ids) * num_samples
    result = Rollout([[]] * rows, [[]] * rows)
    usable = [usable_draft(draft or (), eos_token_id, max_new_tokens) for draft in drafts or [()] * len(prompt_ids)]
    for requests in plan(prompt_ids, usable, num_samples, batch_size):
        batch = SampleBatch(gpt2, requests, settings)
        batch.draw()
        for row, ids, logps in batch.completions():
            result.completion_ids[row], result.logps[row] = ids, logps
    if torch.is_autocast_enabled(gpt2.wte.device.type):
        torch.clear_autocast_cache()  # it holds weights cast without grad, which a training pass must not pick up
    return result


def usable_draft(draft: Sequence[int], eos_token_id: int | None, max_new_tokens: int) -> tuple[int, ...]:
    """The draft up to its first end token, and no longer than a completion may be."""
    ids = list(draft[:max_new_tokens])
    return tuple(ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids)


def _check_tokens(what: str, sequences: Sequence[Sequence[int] | None], vocab_size: int) -> None:
    for i, ids in enumerate(sequences):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise ValueError(f"{what} {i} holds token {wrong}: the model knows 0 to {vocab_size - 1}")


def _check_lengths(prompt_ids: Sequence[Sequence[int]], longest: int) -> None:
    for i, ids in enumerate(prompt_ids):
        if not 0 < len(ids) <= longest:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens: the context leaves room for 1 to {longest} beside max_new_tokens"
            )


def plan(
    prompt_ids: Sequence[Sequence[int]], drafts: Sequence[tuple[int, ...]], num_samples: int, batch_size: int | None
) -> list[list[SampleRequest]]:
    """Group the samples by distinct prompt and cut them into batches: with and without drafts, of similar length.

    A prompt listed twice takes the draft of its first place.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    draft_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    for i, (ids, draft) in enumerate(zip(prompt_ids, drafts, strict=True)):
        draft_of.setdefault(tuple(ids), draft)
        rows.setdefault(tuple(ids), []).extend(range(i * num_samples, (i + 1) * num_samples))
    limit = batch_size or max(1, len(prompt_ids) * num_samples)
    batches: list[list[SampleRequest]] = []
    for drafted in (False, True):
        room = 0
        for prompt in sorted((ids for ids in rows if bool(draft_of[ids]) == drafted), key=len):
            for first in range(0, len(rows[prompt]), limit):
                request = SampleRequest(prompt, draft_of[prompt], tuple(rows[prompt][first : first + limit]), first)
                if room < len(request.rows):
                    batches.append([])
                    room = limit
                batches[-1].append(request)
                room -= len(request.rows)
    return batches
