"""Small things done with any tokenizer: a leading end token, and the text of a completion."""

from collections.abc import Sequence
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

CUT_OFF = "…"  # behind the text of a completion that did not end by itself


def lead_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer put its end token in front of every text; it is saved with it.

    `add_special_tokens=False` leaves it out, which is what a completion that is tokenised by itself needs.
    """
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{eos}:0 $A:0",
        pair=f"{eos}:0 $A:0 $B:1",
        special_tokens=[(eos, tokenizer.eos_token_id)],
    )
    # The slow classes' way of saying the same, for those that rebuild their backend from what was saved.
    tokenizer.bos_token = eos
    tokenizer.init_kwargs["add_bos_token"] = True


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
