"""Shared prefixes in training: the same update as through the model's own forward pass, groups kept together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel
from trl import GRPOTrainer

from rookworld_trl.training import GateError, RookWorldGRPOTrainer, scoring

Make = Callable[..., RookWorldGRPOTrainer]


def batch_of(prompts: list[int], first_row: int) -> dict[str, Any]:
    """Rows with prompts of one or two tokens (a negative one is padding and 1), numbered through from `first_row`."""
    rows = torch.arange(first_row, first_row + len(prompts))
    return {
        "prompt_ids": torch.tensor([[0, -p] if p < 0 else [p, 1] for p in prompts]),
        "prompt_mask": torch.tensor([[0, 1] if p < 0 else [1, 1] for p in prompts]),
        "completion_ids": rows[:, None] * torch.tensor([[1, 10]]),
        "num_images": rows.tolist(),
        "num_items_in_batch": torch.tensor(7),
        "absent": None,
    }


def rows_of(batches: list[dict[str, Any]]) -> list[list[int]]:
    return [batch["num_images"] for batch in batches]


@pytest.fixture
def arguments(make_trainer: Make) -> Callable[..., Any]:
    return lambda **changes: make_trainer(per_device_train_batch_size=4, num_generations=2, **changes).args


@pytest.mark.parametrize(
    ("accumulation", "steps", "expected"),
    [
        (2, 2, [[0, 2, 6, 1], [3, 7, 4, 5]]),  # one optimizer step takes all rows
        (4, 2, [[0, 2, 6, 1], [3, 7, 4, 5]]),  # and all rows of the next generation batch, too
        (1, 2, [[0, 2, 1, 3], [4, 5, 6, 7]]),  # two optimizer steps: each keeps its rows
        (3, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # optimizer steps begin in the middle: nothing moves
    ],
)
def test_regroup_by_hand(
    arguments: Callable[..., Any], accumulation: int, steps: int, expected: list[list[int]]
) -> None:
    """Prompts 5, 6 and 8, and 0-padded 8 (which is another one), in order of first appearance."""
    args = arguments(gradient_accumulation_steps=accumulation, steps_per_generation=steps)
    before = [batch_of([5, 6, 5, 6], 0), batch_of([8, -8, 5, 6], 4)]
    after = scoring.regroup(before, args)
    assert rows_of(after) == expected
    for batch, rows in zip(after, expected, strict=True):
        assert batch["completion_ids"].tolist() == [[row, 10 * row] for row in rows]
        assert batch["num_items_in_batch"] == 7
        assert batch["absent"] is None


@pytest.mark.parametrize("option", [{"loss_type": "bnpo"}, {"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5}])
def test_nothing_moves_where_the_loss_depends_on_micro_batches(arguments: Any, option: dict[str, Any]) -> None:
    args = arguments(gradient_accumulation_steps=2, **option)
    assert rows_of(scoring.regroup([batch_of([5, 6], 0), batch_of([5, 6], 2)], args)) == [[0, 1], [2, 3]]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.0, "loss_type": "grpo", "temperature": 0.7},
    {"num_iterations": 2},
    {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    {"rollout_backend": "transformers", "mask_truncated_completions": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_updates_as_the_models_own_forward(
    make_trainer: Make, policy: GPT2LMHeadModel, settings: dict[str, Any]
) -> None:
    start = policy.state_dict()
    results = []
    for share in (False, True):
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "optim": "sgd"}
        options |= {"learning_rate": 0.1, "beta": 0.1, "rollout_backend": "native", "max_grad_norm": 1e9}
        trainer = make_trainer(share_prefixes=share, **options | settings)
        assert trainer.scorer.shared is share
        trainer.train()
        moved = torch.cat([(trainer.model.state_dict()[name] - start[name]).flatten() for name in start])
        results.append((moved, trainer.state.log_history))
    (stock, stock_log), (shared, shared_log) = results
    assert stock.norm() > 1e-4
    assert (shared - stock).norm() < 1e-4 * stock.norm()
    # TRL logs entropy as a mean over micro-batches of means over their tokens, so moving rows moves it a little.
    tolerances = {"loss": 1e-3, "kl": 1e-3, "grad_norm": 1e-3, "reward": 1e-6, "entropy": 1e-2}
    if settings.get("mask_truncated_completions"):
        del tolerances["entropy"]  # a micro-batch whose rows are all masked counts as 0 in that mean
    for a, b in zip(stock_log[:2], shared_log[:2], strict=True):
        for key in tolerances.keys() & a.keys():  # a step that reuses its completions logs no reward
            assert b[key] == pytest.approx(a[key], rel=tolerances[key], abs=1e-6), key


def test_micro_batches_of_training_hold_whole_groups(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seams `_prepare_inputs`, `_buffered_inputs` and `_step` of TRL."""
    calls: list[tuple[int, int]] = []
    original = scoring.per_token_logps

    def counting(gpt2: Any, prompt_ids: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append((len(prompt_ids), len(prompt_ids.unique(dim=0))))
        return original(gpt2, prompt_ids, *rest)

    monkeypatch.setattr(scoring, "per_token_logps", counting)
    trainer = make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer.train()
    assert calls == [(8, 2)] * 4


def test_stock_deals_groups_over_micro_batches(make_stock: Callable[..., GRPOTrainer]) -> None:
    """Why rows are regrouped at all; if TRL stops doing it, `regroup` can go."""
    trainer = make_stock(gradient_accumulation_steps=4, per_device_train_batch_size=4)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    prompts = [len(batch["prompt_ids"].unique(dim=0)) for batch in trainer._buffered_inputs]
    assert max(prompts) > 1, "TRL seam _prepare_inputs: rows are not shuffled any more"


def test_what_needs_the_models_own_forward_gets_it(make_trainer: Make) -> None:
    trainer = make_trainer(activation_checkpointing=True)
    assert not trainer.scorer.shared
    trainer.train()


def test_gates_watch_the_shared_path(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of stock TRL, planted here: positions counted over the padding."""
    original = scoring.per_token_logps

    def shifted(gpt2: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, *rest: Any) -> Any:
        return original(gpt2, prompt_ids, torch.ones_like(prompt_mask), *rest)

    monkeypatch.setattr(scoring, "per_token_logps", shifted)
    with pytest.raises(GateError, match="gate 'padding' FAILS"):
        make_trainer().train()
