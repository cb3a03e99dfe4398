"""Our loss against the body of TRL's `_compute_loss`, over the options that both know; and by hand."""

import math
from collections import defaultdict
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from trl import GRPOTrainer

from rookworld_trl.training import loss
from rookworld_trl.training.loss import LOSS_TYPES, Scale, Scored

B, C = 5, 7


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def settings(**changes: Any) -> SimpleNamespace:
    """The fields that the loss reads, TRL's defaults."""
    fields = {
        "loss_type": "dapo",
        "max_completion_length": C + 2,
        "steps_per_generation": 4,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": None,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "entropy_target": 0.2,
        "entropy_coef_min": 0.0,
        "entropy_coef_max": 1.0,
        "entropy_coef_delta": 0.005,
        "router_aux_loss_coef": 0.0,
        "use_bias_correction_kl": True,
    }
    return SimpleNamespace(**{**fields, **changes})


def a_batch(seed: int, per_token: bool, sampler: str) -> dict[str, Tensor]:
    """Rows of unlike length, one of them empty, with ratios on both sides of the clip.

    Args:
        sampler: `same` has no log-probs of its own, `before` those of older weights, `other` an engine's besides.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    lengths = torch.tensor([C, 3, 0, 1, 5])
    mask = (torch.arange(C)[None] < lengths[:, None]).long()
    batch = {
        "prompt_ids": torch.ones(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.ones(B, C, dtype=torch.long),
        "completion_mask": mask,
        "num_items_in_batch": torch.tensor(41),
        "advantages": normal(B, C) if per_token else normal(B),
        "logps": (normal(B, C) - 2) * mask,
        "entropies": normal(B, C).abs() * mask,
    }
    if sampler != "same":
        batch["old_per_token_logps"] = batch["logps"] + 0.5 * normal(B, C) * mask
    if sampler == "other":
        batch["sampling_per_token_logps"] = batch["logps"] + 0.7 * normal(B, C) * mask
        batch["sampling_per_token_logps"][0, 1] = math.nan  # an engine that could not score a token
        batch["importance_sampling_ratio"] = normal(B, C).exp()
    return batch


class Stock:
    """TRL's own body, run on log-probs and entropies that are given."""

    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask
    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)
    _compute_loss = GRPOTrainer._compute_loss

    def __init__(self, args: SimpleNamespace, accelerator: Accelerator, training: bool, accumulation: int):
        self.args, self.accelerator, self.model = args, accelerator, SimpleNamespace(training=training)
        self.beta, self.aux_loss_enabled, self.current_gradient_accumulation_steps = 0.0, False, accumulation
        self.loss_type, self.importance_sampling_level = args.loss_type, args.importance_sampling_level
        self.epsilon_low, self.epsilon_high = args.epsilon, args.epsilon_high
        self.off_policy_mask_threshold = args.off_policy_mask_threshold
        self.top_entropy_quantile, self.max_completion_length = args.top_entropy_quantile, args.max_completion_length
        self.entropy_coef, self.use_adaptive_entropy = args.entropy_coef, args.use_adaptive_entropy
        self._entropy_bonus_enabled = bool(args.entropy_coef) or args.use_adaptive_entropy
        self._last_world_entropy, self._entropy_window_stats = math.inf, None
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def __call__(self, batch: dict[str, Tensor], logps: Tensor, entropies: Tensor) -> Tensor:
        self.use_vllm = self.vllm_importance_sampling_correction = "importance_sampling_ratio" in batch
        self._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
        return self._compute_loss(None, batch)


def leaves(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["logps"].clone().requires_grad_(), batch["entropies"].clone().requires_grad_()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"delta": 1.4},
    {"epsilon_high": 0.2, "importance_sampling_level": "sequence"},
    {"off_policy_mask_threshold": 0.05},
    {"off_policy_mask_threshold": 0.05, "importance_sampling_level": "sequence", "delta": 1.3},
    {"top_entropy_quantile": 0.3},
    {"entropy_coef": 0.3},
    {"entropy_coef": -0.2, "top_entropy_quantile": 0.5},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_option_is_trls(accelerator: Accelerator, loss_type: str, training: bool) -> None:
    """Value, gradient and metrics; each combination of options, kinds of advantages and of samplers."""
    kinds = product(OPTIONS, (False, True), ("same", "before", "other"))
    for seed, (options, per_token, sampler) in enumerate(kinds):
        one_value = "off_policy_mask_threshold" in options or "importance_sampling_level" in options
        if per_token and one_value:
            continue  # refused: both take one advantage for the whole completion
        case = f"{options}, {'per token' if per_token else 'per row'}, {sampler}"
        args, batch = settings(loss_type=loss_type, **options), a_batch(seed, per_token, sampler)
        stock = Stock(args, accelerator, training, accumulation=2)
        theirs, ours = leaves(batch), leaves(batch)
        expected = stock(batch, *theirs)
        scale = Scale.of_batch(args, batch, 1, training, 2)
        value, metrics = loss.compute(Scored(*ours), batch, args, scale, accelerator)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12), case
        for mine, its, name in zip(ours, theirs, ("logps", "entropies"), strict=True):
            gradients = [
                torch.autograd.grad(of, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                for of, leaf in ((value, mine), (expected, its))
            ]
            assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12), f"{name}: {case}"
        logged = {name: values[0] for name, values in stock._metrics["train" if training else "eval"].items()}
        logged.pop("entropy_coef", None)  # a setting
        assert metrics == pytest.approx(logged, rel=1e-6, nan_ok=True), case


# What each type makes of these: 3 terms 1, 2, 3 in two rows, the second masked behind its first; two micro-batches a
# step; 8 tokens in the whole step; at most 10 tokens a completion.
BY_HAND = {
    "dapo": (1 + 2 + 3) / 8,
    "grpo": ((1 + 2) / 2 + 3) / 2 / 2,
    "dr_grpo": (1 + 2 + 3) / (2 * 10) / 2,
    "bnpo": (1 + 2 + 3) / 3 / 2,
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_of_tokens_by_hand(loss_type: str) -> None:
    terms, mask = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[1, 1], [1, 0]])
    assert loss.aggregate(terms, mask, Scale(loss_type, 10, 2, 8.0)).item() == pytest.approx(BY_HAND[loss_type])


def test_rows_with_decisions_have_their_objective_in_place_of_their_advantage(accelerator: Accelerator) -> None:
    args = settings(loss_type="bnpo")
    batch = {
        "completion_mask": torch.ones(2, 1, dtype=torch.long),
        "num_items_in_batch": torch.tensor(2),
        "advantages": torch.tensor([3.0, 5.0]),
    }
    logps = torch.zeros(2, 1, requires_grad=True)
    known = Scored(logps, torch.zeros(2, 1), torch.tensor([[7.0], [0.0]]), torch.tensor([False, True]))
    scale = Scale.of_batch(args, batch, 1, True, 1)
    value, _ = loss.compute(known, batch, args, scale, accelerator)
    assert value.item() == pytest.approx((-5 - 7) / 2)
    assert torch.autograd.grad(value, logps)[0].tolist() == [[0.0], [-2.5]]
