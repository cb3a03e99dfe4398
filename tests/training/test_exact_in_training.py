"""The trainer with the exact objective: the update it makes, what it refuses, and runs that resume bit for bit."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from rookworld_trl.modeling import forest
from rookworld_trl.modeling.gpt2 import compiled_graphs
from rookworld_trl.training import GateError, RookWorldGRPOTrainer
from rookworld_trl.training.exact import LEAST_DEVIATION
from tests.training.conftest import PROMPTS
from tests.training.test_placement import LAUNCHED

GOOD, BAD = 7, 11  # two tokens, of which the first should come


def first_token(row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
    return {"decisions": [{"position": 0, "actions": [[GOOD], [BAD]], "rewards": [1.0, 0.25]}]}


@pytest.fixture
def train(make_trainer: Callable[..., RookWorldGRPOTrainer]) -> Callable[..., RookWorldGRPOTrainer]:
    settings = {"objective": "exact", "scale_rewards": "group", "num_generations": 2, "rollout_backend": "auto"}
    return lambda find=first_token, **changes: make_trainer(_find=find, **settings | changes)


def first_probs(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Probabilities (prompts, 2) of the two tokens behind each prompt, each prompt by itself."""
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
            rows.append(model(input_ids=ids).logits[0, -1].softmax(-1)[[GOOD, BAD]])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("packed", "compiled", "entropy_coef", "masked"),
    [
        (True, False, 0.0, False),
        (False, False, 0.0, False),
        (True, False, 0.5, False),
        (False, False, 0.5, False),
        (True, False, 0.0, True),
        (False, False, 0.0, True),
        pytest.param(True, True, 0.0, False, marks=pytest.mark.slow),
        (False, True, 0.0, False),
    ],
)
def test_the_update_is_the_gradient_of_the_sum(
    packed: bool,
    compiled: bool,
    entropy_coef: float,
    masked: bool,
    train: Callable[..., RookWorldGRPOTrainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One plain SGD step without KL: -lr times the gradient of -(sum J / sigma + coef * sum H) / tokens, by autograd on
    plain passes over each row alone.

    Where prefixes can be shared trees are packed, and only there. Their blocks can be compiled; a forward pass that is
    watched cannot, which one line says. Completions that were cut off have no part, if they are masked.
    """
    if compiled:
        torch._dynamo.reset()
        for name, value in LAUNCHED.items():
            monkeypatch.setenv(name, value)
    seen: list[dict[str, Any]] = []
    passes: list[bool] = []
    pack = forest.pack
    monkeypatch.setattr(forest, "pack", lambda *args: (passes.extend([True] * torch.is_grad_enabled()), pack(*args))[1])
    settings = {"per_device_train_batch_size": 16, "share_prefixes": packed, "max_grad_norm": 0.0}
    settings |= {"entropy_coef": entropy_coef, "mask_truncated_completions": masked, "seed": 7}
    with caplog.at_level("WARNING"):
        trainer = train(beta=0.0, max_steps=1, optim="sgd", learning_rate=0.1, **settings)
    said = [record.message for record in caplog.records if "torch_compile" in record.message]
    assert len(said) == (compiled and not packed), said
    policy = trainer.model
    inner, start = trainer._compute_loss, {n: p.detach().clone() for n, p in policy.named_parameters()}
    trainer._compute_loss = lambda model, inputs: (seen.append(inputs), inner(model, inputs))[1]  # type: ignore[method-assign]
    before = compiled_graphs()
    trainer.train()
    (batch,) = seen
    assert passes == [True] * packed
    assert (compiled_graphs() > before) == (packed and compiled)
    end = {n: p.detach().clone() for n, p in policy.named_parameters()}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(start[name])
    objective = torch.zeros(())
    sides = [batch[f"{side}_{part}"] for side in ("prompt", "completion") for part in ("ids", "mask")]
    for ids, mask, after, real in zip(*sides, strict=True):
        prompt, completion = ids[mask.bool()], after[real.bool()]
        if not len(completion):
            continue
        logps = policy(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        objective = objective - entropy_coef * (logps.exp() * logps).sum()
        probs = logps[0].exp()
        value = probs[GOOD] + 0.25 * probs[BAD]
        square = probs[GOOD] + 0.25**2 * probs[BAD]
        objective = objective + value / ((square - value**2).detach().sqrt() + LEAST_DEVIATION)
    loss = -objective / batch["completion_mask"].sum()
    assert masked == (batch["completion_mask"].sum(1) == 0).any()
    policy.zero_grad()
    loss.backward()
    for name, parameter in policy.named_parameters():
        wanted = start[name] if parameter.grad is None else start[name] - 0.1 * parameter.grad
        torch.testing.assert_close(end[name], wanted, rtol=1e-4, atol=1e-6)
    assert max((end[n] - start[n]).abs().max() for n in start) > 1e-3


def test_metrics_are_means_over_the_decisions_of_a_step(
    train: Callable[..., RookWorldGRPOTrainer], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Five prompts of eight have a decision, in micro-batches of two prompts: their values count alike, and what the
    table of completions calls their advantage is none."""

    def find(row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
        return first_token(row, completion) if row["prompt"].startswith("P") else {}

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = train(find, log_completions=True, **settings)
    values = first_probs(trainer.model, tiny_tokenizer) @ torch.tensor([1.0, 0.25])
    chosen = torch.tensor([prompt.startswith("P") for prompt in PROMPTS])
    sizes: list[int] = []
    inner = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (  # type: ignore[method-assign]
        sizes.append(sum(bool(each["decisions"]) for each in inputs["points"])), inner(model, inputs)
    )[1]  # fmt: skip
    trainer.train()
    assert sum(sizes) == 10
    assert len(set(sizes)) > 1
    assert trainer.state.log_history[0]["exact/value"] == pytest.approx(values[chosen].mean().item(), rel=1e-5)
    shown = list(zip(trainer._logs["prompt"], trainer._logs["advantages"], strict=True))
    assert len(shown) == 16
    assert all(math.isnan(advantage) == prompt.startswith("P") for prompt, advantage in shown)
    assert any(advantage for prompt, advantage in shown if prompt.startswith("A"))


def test_it_learns_what_earns_and_reports_what_was_sampled(
    train: Callable[..., RookWorldGRPOTrainer], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = train(learning_rate=3e-3, max_steps=30)
    before = first_probs(trainer.model, tiny_tokenizer)
    trainer.train()
    after = first_probs(trainer.model, tiny_tokenizer)
    assert before[:, 0].mean() < 0.2
    assert after[:, 0].mean() > 0.8
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert log[-1]["exact/value"] > log[0]["exact/value"] + 0.5
    assert 0 <= log[-1]["reward"] <= 1  # the reward function's, of sampled completions
    assert "kl" in log[-1]


def test_micro_batches_whose_completions_are_all_masked(
    train: Callable[..., RookWorldGRPOTrainer], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Micro-batches of one group: of some nothing is left. The share of decisions is that of what is left."""
    rows: list[torch.Tensor] = []
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_steps": 2}
    trainer = train(mask_truncated_completions=True, entropy_coef=0.1, max_completion_length=12, **settings)
    inner = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (  # type: ignore[method-assign]
        rows.append(inputs["completion_mask"].sum(1)), inner(model, inputs)
    )[1]  # fmt: skip
    trainer.train()
    empty = [not counts.any() for counts in rows]
    assert any(empty)
    assert not all(empty)
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert {row["exact/decided/"] for row in log if "exact/decided/" in row} == {1.0}


def test_it_works_with_adapters_and_control(train: Callable[..., RookWorldGRPOTrainer]) -> None:
    adapters = {"use_peft": True, "rollout_backend": "transformers"}
    trainer = train(kl_control="multiplicative", kl_interval=1, max_steps=3, learning_rate=1e-3, **adapters)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[1]["kl"] > 0


def test_a_resumed_run_equals_one_that_was_not_interrupted(
    train: Callable[..., RookWorldGRPOTrainer], options: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    whole, again = train(**settings), train(**settings)
    whole.train()
    again.train(resume_from_checkpoint=str(Path(options["output_dir"], "checkpoint-2")))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_points_and_objective_belong_together(train: Callable[..., RookWorldGRPOTrainer]) -> None:
    with pytest.raises(ValueError, match=r"`objective` is 'exact'.*find_points"):
        train(None)
    with pytest.raises(ValueError, match=r"`objective` is 'sampled'.*find_points"):
        train(objective="sampled")


def only_determined(row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
    return {"determined": [{"position": 0, "tokens": [GOOD, BAD]}]}


def test_a_first_batch_without_a_decision_is_refused(
    train: Callable[..., RookWorldGRPOTrainer], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """In which of the tasks, what was sampled and what belongs there; no weight has moved."""
    trainer = train(lambda row, ids: first_token(row, ids) if row["task"] == "A" else only_determined(row, ids))
    trainer.train_dataset = trainer.train_dataset.add_column("task", [prompt[0] for prompt in PROMPTS])
    trainer.args.per_device_train_batch_size = 16
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    right = re.escape(repr(tiny_tokenizer.decode([GOOD, BAD])))
    with pytest.raises(GateError, match=rf"gate 'decisions' FAILS.*task 'P': '.*' was sampled where {right} belongs"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_later_batch_without_a_decision_is_not_trained_on_and_red(
    train: Callable[..., RookWorldGRPOTrainer], tmp_path: Path
) -> None:
    weights: list[torch.Tensor] = []

    def find(row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
        return (first_token if trainer.state.global_step == 0 else only_determined)(row, completion)

    trainer = train(find, beta=0.0, max_steps=3, learning_rate=1e-2, weight_decay=0.0, health_patience=1)
    trainer.args.max_grad_norm = 0.0
    inner = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (  # type: ignore[method-assign]
        weights.append(next(trainer.model.parameters()).detach().clone()), inner(*args, **kwargs)
    )[1]  # fmt: skip
    for group in trainer.create_optimizer().param_groups:
        group["betas"] = (0.0, 0.999)  # no update is left over from the first step
    trainer.train()
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["exact/decided/"] for row in log] == [1.0, 0.0, 0.0]
    assert trainer.plugins[0].levels["exact/decided/"] == "red"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"), "flash_attention_2"),
        (lambda model: setattr(model.lm_head, "base_layer", None), "adapter sits on the output head"),
    ],
)
def test_models_whose_forward_pass_takes_no_tree_are_refused(
    train: Callable[..., RookWorldGRPOTrainer], change: Callable[[Any], None], message: str
) -> None:
    trainer = train()
    change(trainer.model)
    parts = trainer.exact
    assert parts is not None
    names = ("args", "accelerator", "policy", "scorer", "find", "decode", "record")
    with pytest.raises(ValueError, match=message):
        type(parts)(*(getattr(parts, name) for name in names))
