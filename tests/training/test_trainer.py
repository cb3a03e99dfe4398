"""The trainer's own promises: weights, reference, tokenizer, rollout backend."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from rookworld_trl.training import RookWorldGRPOTrainer
from tests.support.builders import random_gpt2

Make = Callable[..., RookWorldGRPOTrainer]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reference_of_an_object_is_the_object(make_trainer: Make, policy: GPT2LMHeadModel, tmp_path: Path) -> None:
    """The name points to other weights, as it does for a model fine-tuned in memory."""
    policy.save_pretrained(tmp_path / "base")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        loaded.transformer.wte.weight.add_(1.0)
    start = weights(loaded)
    trainer = make_trainer(_model=loaded, learning_rate=1e-2)
    assert same(start, weights(trainer.ref_model))
    assert trainer.model.config._name_or_path == str(tmp_path / "base")
    trainer.train()
    assert same(start, weights(trainer.ref_model))
    assert not same(start, weights(trainer.model))
    assert not trainer.ref_model.training


def test_a_sixteen_bit_model_without_a_name(make_trainer: Make, policy: GPT2LMHeadModel) -> None:
    """Its weights are widened exactly, the reference has the same, and dropout is off in both."""
    assert policy.config._name_or_path == ""
    policy.to(torch.bfloat16)
    before = [parameter.float() for parameter in weights(policy)]
    trainer = make_trainer()
    assert trainer.model.config._name_or_path == ""
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    for model in (trainer.model, trainer.ref_model):
        assert same(before, weights(model))
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0}
    trainer.train()


def test_no_reference_with_beta_zero(make_trainer: Make) -> None:
    trainer = make_trainer(beta=0.0)
    assert trainer.ref_model is None
    trainer.train()


def test_the_head_scores_in_float32_under_autocast(make_trainer: Make, policy: GPT2LMHeadModel) -> None:
    """Without layers only the head could round: TRL's and the shared passes' log-probs are those of float32."""
    config = copy.deepcopy(policy.config)
    config.n_layer = 0
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(30.0)
        ids = torch.randint(3, config.vocab_size, (4, 10), generator=torch.Generator().manual_seed(1))
        logps = model(ids).logits.log_softmax(-1)[:, 3:-1].gather(-1, ids[:, 4:, None])[..., 0]
    for shared in (False, True):
        trainer = make_trainer(_model=copy.deepcopy(model), bf16=True, share_prefixes=shared)
        assert trainer.scorer.shared is shared
        for scored in (trainer.model, trainer.ref_model):
            with torch.no_grad(), trainer.accelerator.autocast():
                found, *_ = trainer._get_per_token_logps_and_entropies(scored, ids, torch.ones_like(ids), 6)
            torch.testing.assert_close(found, logps, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_tokenizer_without_special_tokens_is_refused(
    make_trainer: Make, tiny_tokenizer: PreTrainedTokenizerFast, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_tokenizer._special_tokens_map, token, None)
    with pytest.raises(ValueError, match=f"has no `{token}`.*Set `tokenizer.{token}`"):
        make_trainer()


def test_stock_config_is_refused(policy: GPT2LMHeadModel, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a RookWorldGRPOConfig, got GRPOConfig"):
        RookWorldGRPOTrainer(policy, lambda **_: [], GRPOConfig(**options))


def test_context_overrun_is_named(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"`max_completion_length` is 60: .*context of 64\. Set it to \d+ or less"):
        make_trainer(max_completion_length=60).train()


def test_backend_choice(make_trainer: Make, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_trainer(rollout_backend="auto").sampler.backend == "native"
    other = make_trainer(_model=random_gpt2(activation_function="relu"), rollout_backend="auto", max_steps=1)
    assert (other.sampler.backend, other.scorer.shared) == ("transformers", False)
    other.train()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    trainer = make_trainer(_model=llama, rollout_backend="auto")
    assert trainer.sampler.backend == "transformers"
    trainer.train()
    with pytest.raises(ValueError, match=r"'native', which decodes GPT-2 .* LlamaForCausalLM"):
        make_trainer(_model=llama, rollout_backend="native")


@pytest.mark.parametrize("adapters", [{}, {"use_peft": True, "lora_r": 2, "rollout_backend": "auto"}], ids=["", "lora"])
def test_what_is_saved_generates_with_a_cache(make_trainer: Make, tmp_path: Path, adapters: dict[str, Any]) -> None:
    """transformers' trainers turn the cache off, and what they save so computes every token from the first one on."""
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1, **adapters)
    assert not trainer.model.config.use_cache
    trainer.train()
    trainer.write_model()
    saved = {Path(trainer.args.output_dir, "checkpoint")}
    saved |= set() if adapters else {Path(trainer.args.output_dir, "checkpoint-1")}
    for folder in saved:
        assert AutoConfig.from_pretrained(folder).use_cache, folder
        assert GPT2LMHeadModel.from_pretrained(folder).generation_config.use_cache is not False
    assert not trainer.model.config.use_cache
