"""One process that sees two cards: whatever is loaded by name, policy or reference, stays whole on one device.

Two stand-ins, on a CPU: TRL believes that it is on a GPU, and asks for `device_map="auto"`; what transformers answers
is accelerate's own split of a model over two devices, of which the second is the disk.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, modeling_utils
from trl.trainer import utils

from rookworld_trl.training import RookWorldGRPOTrainer

Make = Callable[..., RookWorldGRPOTrainer]


def halves(model: nn.Module, device_map: Any, *_: Any) -> Any:
    """In place of transformers' answer, which asks real cards for their memory: the last block on another device."""
    if device_map != "auto":
        return device_map
    layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    last = f"{layers}.{len(model.get_submodule(layers)) - 1}"
    whole = {name for name, module in model.named_modules() if name and not list(module.children())}
    blocks = {f"{layers}.{index}" for index in range(len(model.get_submodule(layers)))}
    parts = {name for name in whole if not name.startswith(f"{layers}.")} | blocks
    return {name: "disk" if name == last else "cpu" for name in sorted(parts)}


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(modeling_utils, "_get_device_map", halves)


@pytest.fixture
def names(policy: nn.Module, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> dict[str, str]:
    """Folders of a GPT-2 and of a model that is none, by kind."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **sizes))
    for kind, model in (("gpt2", policy), ("llama", llama)):
        model.save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
    return {kind: str(tmp_path / kind) for kind in ("gpt2", "llama")}


def test_the_stand_in_splits_a_model(two_cards: None, names: dict[str, str]) -> None:
    for name in names.values():
        assert set(utils.create_model_from_path(name).hf_device_map.values()) == {"cpu", "disk"}


@pytest.mark.parametrize(
    ("kind", "named", "settings"),
    [
        ("gpt2", True, {"rollout_backend": "auto"}),
        ("gpt2", False, {"rollout_backend": "auto"}),
        ("gpt2", True, {"share_prefixes": False, "activation_checkpointing": True}),
        ("llama", True, {}),
        ("gpt2", False, {"ref_device": "cpu"}),
    ],
    ids=["the README's", "the recipes'", "padded rows", "no GPT-2", "a reference apart"],
)
def test_every_model_is_whole_on_one_device(
    make_trainer: Make,
    names: dict[str, str],
    request: pytest.FixtureRequest,
    kind: str,
    named: bool,
    settings: dict[str, Any],
) -> None:
    """By name, as in the README; an object, as the recipes hand it over, of which TRL loads the reference. The numbers
    are those of a machine with one device."""

    def trained() -> RookWorldGRPOTrainer:
        model = names[kind] if named else AutoModelForCausalLM.from_pretrained(names[kind], dtype=torch.float32)
        trainer = make_trainer(_model=model, beta=0.1, learning_rate=1e-2, seed=1, **settings)
        trainer.train()
        return trainer

    alone = trained()
    request.getfixturevalue("two_cards")
    trainer = trained()
    for model in (trainer.model, trainer.ref_model):
        assert len(set(getattr(model, "hf_device_map", {}).values())) <= 1
        assert not [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
        assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}
    for log, other in zip(alone.state.log_history[:-1], trainer.state.log_history[:-1], strict=True):
        for key in ("kl", "loss", "reward", "grad_norm"):
            assert log[key] == other[key], key
    assert trainer.state.log_history[-2]["kl"] != 0


def test_a_model_that_is_split_is_refused(make_trainer: Make, names: dict[str, str], two_cards: None) -> None:
    split = AutoModelForCausalLM.from_pretrained(names["gpt2"], device_map="auto")
    message = r"^the model is spread over cpu, disk: .* one device each\. Load it without `device_map`"
    with pytest.raises(ValueError, match=message):
        make_trainer(_model=split)
    with pytest.raises(ValueError, match=message):
        make_trainer(_model=names["gpt2"], model_init_kwargs={"device_map": "auto"})
