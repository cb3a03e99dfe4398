"""LoRA: only adapters train, against the frozen base; the gates hold; the merged export is the policy without peft."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training import RookWorldGRPOTrainer

Make = Callable[..., RookWorldGRPOTrainer]
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "rollout_backend": "auto"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_target_modules": ["c_attn"]}, {"task_sampling": {"": {"temperature": 0.6}}}],
    ids=str,
)
def test_only_adapters_train(make_trainer: Make, policy: GPT2LMHeadModel, settings: dict[str, Any]) -> None:
    base = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    trainer = make_trainer(_model=policy, **LORA, learning_rate=1e-1, max_steps=2, **settings)
    assert trainer.sampler.backend == "transformers"
    assert not trainer.scorer.shared
    assert trainer.ref_model is None
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable}
    assert layers == ({"c_attn"} if "lora_target_modules" in settings else {"c_attn", "c_proj", "c_fc"})
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] > 1e-6
    after = {name.replace(".base_layer", ""): tensor for name, tensor in policy.state_dict().items()}
    assert all(torch.equal(base[name], after[name]) for name in base)


def test_the_merged_export_is_the_policy(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(**LORA, learning_rate=1e-1)
    trainer.train()
    trainer.save_merged(tmp_path / "merged")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<pad>"
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        policy = trainer.model.eval()(ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(ids).logits
        merged = trainer.merged_model()
        assert torch.allclose(loaded(ids).logits, policy, atol=1e-4)
        assert torch.allclose(merged(ids).logits, policy, atol=1e-4)
        assert not torch.allclose(base, policy, atol=1e-2)
        merged.transformer.wte.weight.zero_()  # a copy: the policy is left alone
        assert torch.equal(trainer.model(ids).logits, policy)
    assert len(rollout(loaded, [[5, 6]], max_new_tokens=2, eos_token_id=None).completion_ids[0]) == 2


def test_adapters_sample_in_the_precision_that_the_loss_scores_in(make_trainer: Make, monkeypatch: Any) -> None:
    """`generate` goes past the wrapper by which accelerate switches autocast on."""
    seen: list[bool] = []
    trainer = make_trainer(**LORA, bf16=True, max_steps=1)
    forward = trainer.model.base_model.model.transformer.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model.base_model.model.transformer, "forward", spy)
    trainer.train()
    assert len(seen) > 4
    assert all(seen)
