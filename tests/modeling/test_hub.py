"""Pushing: what arrives, what must not, and what each refusal says. The Hub is a server on loopback."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.hub import PushError, push_folder
from rookworld_trl.modeling.loading import load
from tests.support.hub import TOKEN, Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Tests need not wait for a server that is not there to recover.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with serve(monkeypatch) as server:
        yield server


def test_what_is_pushed_is_the_model_and_no_more(
    hub: Hub, tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tiny_checkpoint / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A card\n")
    (tiny_checkpoint / "training_args.bin").write_bytes(b"the token is in here")
    push_folder(tiny_checkpoint, "me/trained", token=TOKEN)
    files = hub.repositories["me/trained"].branches["main"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert "training_args.bin" not in files
    assert hub.repositories["me/trained"].commits == ["Trained checkpoint"]
    assert ("POST", "/me/trained.git/info/lfs/verify") in hub.requests
    strict, _ = load("me/trained", cache_dir=tmp_path / "again", token=TOKEN)
    assert torch.equal(strict.transformer.wte.weight, tiny_model.transformer.wte.weight)


def test_a_push_to_a_branch_leaves_the_main_one(hub: Hub, tiny_checkpoint: Path) -> None:
    push_folder(tiny_checkpoint, "me/trained", token=TOKEN)
    (tiny_checkpoint / "README.md").write_text("---\ntags: [chess]\n---\n")
    push_folder(tiny_checkpoint, "me/trained", token=TOKEN, revision="next")
    repository = hub.repositories["me/trained"]
    assert "README.md" in repository.branches["next"]
    assert "README.md" not in repository.branches["main"]
    assert len(repository.commits) == 2


REFUSALS = {
    "wrong token": ({"token": "hf_read"}, None, "401"),
    "no right": ({}, ("/api/repos/create", 403, ""), "403"),
    "gone": ({}, ("/preupload/", 404, "RepoNotFound"), "404"),
    "lasting trouble": ({}, ("/commit/", 500, ""), "500"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do_and_that_nothing_is_lost(hub: Hub, tiny_checkpoint: Path, case: str) -> None:
    options, failure, status = REFUSALS[case]
    if failure:
        hub.fail(*failure)
    with pytest.raises(
        PushError, match=rf"(?s)pushing to me/trained failed .*{status}.*check `hub_model_id`.*`hf auth login`"
    ) as raised:
        push_folder(tiny_checkpoint, "me/trained", **{"token": TOKEN, **options})
    assert f"`hf upload me/trained {tiny_checkpoint}`" in str(raised.value)
    arrived = hub.repositories["me/trained"].branches["main"] if "me/trained" in hub.repositories else {}
    assert not arrived


def test_without_a_network(hub: Hub, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="network and HF_HUB_OFFLINE"):
        push_folder(tiny_checkpoint, "me/trained", token=TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="network and HF_HUB_OFFLINE"):
        push_folder(tiny_checkpoint, "me/trained", token=TOKEN)
