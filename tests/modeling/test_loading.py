"""Loading: strict about every file, one clear error each; the Hub is a small server on loopback."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.loading import LoadingError, checkpoint_folder, load, load_model, load_tokenizer
from tests.support.hub import Hub, serve

IDS = torch.tensor([[3, 5, 8, 13]])


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (with None) remove tensors; `__` in a name stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors")


def test_a_saved_model_loads_exactly(tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, expected_parameters=tiny_model.num_parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model.eval()(IDS).logits)
        assert torch.equal(model.train()(IDS).logits, tiny_model.eval()(IDS).logits), "dropout must be 0"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config._name_or_path == str(tiny_checkpoint)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id


def test_low_precision_files_become_fp32_masters(tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path) -> None:
    tiny_model.to(torch.bfloat16).save_pretrained(tiny_checkpoint)
    model = load_model(tiny_checkpoint)
    assert model.dtype == torch.float32
    assert torch.equal(model.transformer.wpe.weight, tiny_model.transformer.wpe.weight.float())


@pytest.mark.parametrize("config_is_padded", [False, True])
def test_padded_vocabularies_are_cut_to_the_tokenizer(
    tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, config_is_padded: bool
) -> None:
    words = tiny_model.transformer.wte.weight.detach()
    padding = torch.full((128 - len(words), words.shape[1]), 9.0)  # would win every draw
    edit_weights(tiny_checkpoint, transformer__wte__weight=torch.cat([words, padding]))
    if config_is_padded:
        edit_config(tiny_checkpoint, vocab_size=128)
    model, tokenizer = load(tiny_checkpoint)
    assert model.config.vocab_size == len(tokenizer) == len(words)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model.eval()(IDS).logits)


def test_bare_names_and_old_masks_are_read(tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path) -> None:
    weights = load_file(tiny_checkpoint / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": bare["wte.weight"].clone()}
    save_file(bare, tiny_checkpoint / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tiny_checkpoint)(IDS).logits, tiny_model.eval()(IDS).logits)


def test_pickled_weights_are_not_read(tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), tiny_checkpoint / "pytorch_model.bin")
    with pytest.raises(LoadingError, match=r"has no model\.safetensors: save the model with save_pretrained"):
        load_model(tiny_checkpoint)


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        r"model\.safetensors is damaged .*download it again",
    ),
    (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\.safetensors"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": '), r"config\.json is not valid JSON"),
    (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
    (lambda folder: edit_config(folder, model_type="llama"), r"model_type is 'llama', only 'gpt2'"),
    (lambda folder: edit_config(folder, activation_function="mish"), r"config\.json: activation_function is 'mish'"),
    (lambda folder: edit_config(folder, n_layer=1), r"(?s)Unexpected key\(s\).*h\.1\..*take both from one"),
    (
        lambda folder: edit_weights(folder, transformer__h__1__mlp__c_fc__bias=None),
        r"Missing key.*h\.1\.mlp\.c_fc\.bias",
    ),
    (
        lambda folder: edit_weights(folder, transformer__wpe__weight=torch.ones(9, 32)),
        r"size mismatch for .*wpe\.weight",
    ),
    (lambda folder: edit_weights(folder, lm_head__weight=torch.ones(42, 32)), r"lm_head\.weight differs from wte"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_broken_files_are_named(tiny_checkpoint: Path, break_it: Callable[[Path], object], message: str) -> None:
    break_it(tiny_checkpoint)
    with pytest.raises(LoadingError, match=message):
        load_model(tiny_checkpoint)


def test_broken_tokenizers_are_named(tiny_checkpoint: Path) -> None:
    tokenizer = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text())
    (tiny_checkpoint / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "pad_token": None}))
    assert load_tokenizer(tiny_checkpoint).pad_token == "<eos>"
    (tiny_checkpoint / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": None}))
    with pytest.raises(LoadingError, match="has no end token: set eos_token"):
        load_tokenizer(tiny_checkpoint)
    (tiny_checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(LoadingError, match="cannot be read"):
        load_tokenizer(tiny_checkpoint)
    (tiny_checkpoint / "tokenizer.json").unlink()
    with pytest.raises(LoadingError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tiny_checkpoint)


def test_model_and_tokenizer_must_fit(tiny_checkpoint: Path) -> None:
    with pytest.raises(LoadingError, match=r"37,056 parameters, and `expected_parameters` is 124439808: check name"):
        load(tiny_checkpoint, expected_parameters=124_439_808)
    words = load_file(tiny_checkpoint / "model.safetensors")["transformer.wte.weight"]
    edit_weights(tiny_checkpoint, transformer__wte__weight=words[:-2].clone())
    edit_config(tiny_checkpoint, vocab_size=len(words) - 2)
    with pytest.raises(LoadingError, match=f"the tokenizer has {len(words)} tokens, the model {len(words) - 2}"):
        load(tiny_checkpoint)


@pytest.fixture
def hub(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tiny_checkpoint / "optimizer.pt").write_bytes(b"large")
    with serve(monkeypatch) as server:
        server.add("me/rook", tiny_checkpoint)
        yield server


def test_a_repository_is_downloaded_once_and_found_again(hub: Hub, tiny_model: GPT2LMHeadModel, tmp_path: Path) -> None:
    where = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint}
    model, _ = load("me/rook", token="hf_secret", **where)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model.eval()(IDS).logits)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.fetched)
    assert "optimizer.pt" not in hub.fetched
    assert hub.tokens == {"Bearer hf_secret", None}  # the storage of large files gets no token
    hub.fetched.clear()
    commit = hub.repositories["me/rook"].sha("main")
    folder = checkpoint_folder("me/rook", revision=commit, **where)
    assert folder.name == commit
    assert checkpoint_folder("me/rook", local_files_only=True, **where) == folder
    assert not hub.fetched


@pytest.mark.parametrize(
    ("name", "revision", "failure", "message"),
    [
        ("me/rook", None, (403, "GatedRepo"), "me/rook is no folder, .*403 .*run `hf auth login`"),
        ("me/nothing", None, None, "me/nothing is no folder, .*404.* check name"),
        ("me/rook", "v9", None, r"Invalid rev id: v9|404.*check name, revision"),
        ("./no/such/folder", None, None, "./no/such/folder is no folder, .*check name"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(
    hub: Hub, tmp_path: Path, name: str, revision: str | None, failure: tuple[int, str] | None, message: str
) -> None:
    if failure is not None:
        hub.fail("/me/rook", *failure)
    with pytest.raises(LoadingError, match=f"(?s){message}"):
        checkpoint_folder(name, revision=revision, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)


def test_no_network_says_what_to_do(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(LoadingError, match="check name, revision, network"):
        checkpoint_folder("me/rook", endpoint="http://127.0.0.1:9", **where)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadingError, match="HF_HUB_OFFLINE"):
        checkpoint_folder("me/rook", endpoint=hub.endpoint, **where)
    assert not hub.fetched
