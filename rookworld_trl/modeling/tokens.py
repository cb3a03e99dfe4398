"""Small things done with any tokenizer: a leading end token, and where a completion begins among the tokens."""

from tokenizers import processors
from transformers import PreTrainedTokenizerBase


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


def token_index(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """The index of the token that begins at character `start` of `text`, special tokens in front counted.

    Raises:
        ValueError: a token reaches over `start`, so what follows it cannot be scored by itself.
    """
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for index, (begin, end) in enumerate(offsets):
        if begin < start < end:
            raise ValueError(f"token {index}, {text[begin:end]!r}, reaches over character {start} of {text!r}")
        if begin >= start and end > begin:
            return index
    return len(offsets)
