"""Completions of prompts, as every evaluation needs them: batched by length, seeded by prompt, in the given order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.tokens import completion_texts
from rookworld_trl.settings.terminal import progress_bar


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
    longest, prompt = max((len(ids), prompt) for ids, prompt in zip(_encode(tokenizer, prompts), prompts, strict=True))
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
    progress: str = "",
) -> list[Completion]:
    """Complete each prompt once. Prompts are encoded, and completions decoded, as the trainer does it.

    Args:
        temperature: 0 for greedy.
        batch_size: prompts decoded at a time; changes speed and memory, not the texts. Equal prompts get different
            samples only within one batch.
        progress: title of a progress bar; empty for none.

    Raises:
        ValueError: the tokenizer has no end token, or a prompt leaves no room for `max_new_tokens`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no completion would ever end; set one")
    if not prompts:
        return []
    prompt_ids = _encode(tokenizer, prompts)
    # Prompts of one task and similar length side by side: their completions end at about the same time.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][:1], len(prompt_ids[i])))
    completion_ids: list[list[int]] = [[]] * len(prompts)
    with progress_bar(progress, len(prompts), "prompt") as bar:
        for first in range(0, len(prompts), batch_size):
            batch = order[first : first + batch_size]
            sampled = rollout(
                model,
                [prompt_ids[i] for i in batch],
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                temperature=temperature,
                seed=seed,
            )
            for i, ids in zip(batch, sampled.completion_ids, strict=True):
                completion_ids[i] = ids
            bar.update(len(batch))
    texts = completion_texts(tokenizer, completion_ids)
    ended = [bool(ids) and ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
    return [Completion(text, len(ids), end) for text, ids, end in zip(texts, completion_ids, ended, strict=True)]


def _encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(prompts))["input_ids"]
