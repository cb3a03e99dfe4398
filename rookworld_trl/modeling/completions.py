"""Completions of prompts, as every evaluation needs them: batched by length, seeded by prompt, in the given order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rookworld_trl.modeling.rollout import rollout

CUT_OFF = "…"  # behind the text of a completion that did not end by itself


def completion_texts(
    tokenizer: Any, completion_ids: Sequence[Sequence[int]], eos_token_ids: Sequence[int] | None = None
) -> list[str]:
    """The texts of completions as everything that scores or plays them reads them: what was sampled, all of it.

    Only the end token at the end is left out. Other special tokens, pad and unknown among them, stay visible, and a
    completion without an end token has `CUT_OFF` behind it: no format has room for either.

    Args:
        eos_token_ids: tokens that end a completion; by default the tokenizer's own.
    """
    ends = [tokenizer.eos_token_id] if eos_token_ids is None else eos_token_ids
    ended = [len(ids) > 0 and ids[-1] in ends for ids in completion_ids]
    shown = [list(ids[: len(ids) - end]) for ids, end in zip(completion_ids, ended, strict=True)]
    texts = tokenizer.batch_decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text if end else text + CUT_OFF for text, end in zip(texts, ended, strict=True)]


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion's text by `completion_texts`, its length in tokens, and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


def fitting_length(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> int:
    """`max_new_tokens`, cut to what the model's context leaves behind the longest prompt.

    Raises:
        ValueError: a prompt fills the context.
    """
    context = model.config.n_positions
    ids_of = tokenizer(list(prompts))["input_ids"]
    longest, prompt = max((len(ids), prompt) for ids, prompt in zip(ids_of, prompts, strict=True))
    if longest >= context:
        raise ValueError(
            f"the {longest} tokens of prompt {prompt!r} fill the model's context of {context}; "
            "leave such rows out, or use the tokenizer that belongs to the model"
        )
    return min(max_new_tokens, context - longest)


def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    told: Callable[[int], object] = lambda count: None,
) -> list[Completion]:
    """Complete each prompt once. Prompts are encoded, and completions decoded, as the trainer does it.

    Args:
        temperature: 0 for greedy.
        batch_size: prompts decoded at a time; changes speed and memory, not the texts. Equal prompts get different
            samples only within one batch.
        told: how many more prompts are done, after each batch.

    Raises:
        ValueError: the tokenizer has no end token, or a prompt leaves no room for `max_new_tokens`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no completion would ever end; set one")
    if not prompts:
        return []
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    # Prompts of one task and similar length side by side: their completions end at about the same time.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][:1], len(prompt_ids[i])))
    completion_ids: list[list[int]] = [[]] * len(prompts)
    for first in range(0, len(prompts), batch_size):
        batch = order[first : first + batch_size]
        ids_of = [prompt_ids[i] for i in batch]
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if model.config.model_type == "gpt2":
            sampled = rollout(model, ids_of, eos_token_id=tokenizer.eos_token_id, **settings).completion_ids
        else:
            sampled = _generated(model, tokenizer, ids_of, **settings)
        for i, ids in zip(batch, sampled, strict=True):
            completion_ids[i] = ids
        told(len(batch))
    texts = completion_texts(tokenizer, completion_ids)
    ended = [bool(ids) and ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
    return [Completion(text, len(ids), end) for text, ids, end in zip(texts, completion_ids, ended, strict=True)]


def _generated(
    model: PreTrainedModel, tokenizer: Any, ids: list[list[int]], max_new_tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    """Completions by transformers, up to the end token, of models that `rollout` does not know; seeded by batch."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width, end = max(map(len, ids)), tokenizer.eos_token_id
    rows = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    trains = model.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = model.eval().generate(
            rows, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=end, **how
        )
    model.train(trains)
    texts = found[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in texts]


def target_logps(
    model: nn.Module,
    rows: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-prob (N,), nats, of each row's second token list after its first, without gradients.

    Rows are padded on the right, where causal attention makes padding harmless, and taken in the order of their
    lengths, so that there is little of it. What comes before all targets of a batch doesn't go through the head.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: sum(map(len, rows[row])))
    totals = torch.zeros(len(rows), device=device)
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        lengths = [(len(rows[row][0]), sum(map(len, rows[row]))) for row in part]
        width = max(length for _, length in lengths)
        padded = [[*rows[row][0], *rows[row][1]] + [pad_token_id] * width for row in part]
        ids = torch.tensor([row[:width] for row in padded], device=device)
        place = torch.arange(width, device=device)
        begins, ends = torch.tensor(lengths, device=device)[:, :, None].unbind(1)
        target = ((begins <= place) & (place < ends))[:, 1:]
        keep = width - int(begins.min()) + 1  # the last positions, from the one that predicts the first target on
        with torch.no_grad():
            attention = (place < ends).long()
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        kept = logits.shape[1]  # fewer than `keep` where a target begins the row: nothing predicts its first token
        logps = torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, ids[:, -kept:, None])[..., 0]
        totals[torch.tensor(part, device=device)] = (logps * target[:, -kept:]).sum(dim=1)
    return totals
