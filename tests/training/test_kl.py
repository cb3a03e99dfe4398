"""KL by enumeration over a tiny vocabulary: values and gradients in float64, biases where the table says so."""

import math

import pytest
import torch
from torch import Tensor

from rookworld_trl.training.kl import KLController, estimate_kl

KL_TYPES = ("policy_to_reference", "reference_to_policy", "symmetric")
POLICY = torch.tensor([0.3, -1.2, 0.8, 0.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([-0.5, 0.9, 0.2, -0.3, 0.1], dtype=torch.float64)


def true_kl(logits: Tensor, kl_type: str) -> Tensor:
    """By definition, with probabilities spelled out."""
    p, q = logits.exp() / logits.exp().sum(), REFERENCE.exp() / REFERENCE.exp().sum()
    there, back = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    return {"policy_to_reference": there, "reference_to_policy": back, "symmetric": (there + back) / 2}[kl_type]


def expected(kl_type: str, estimator: str, corrected: bool) -> tuple[float, Tensor]:
    """Expectation over y ~ policy of an estimator's value and of its gradient, each y weighed by its probability."""
    weight = torch.softmax(POLICY, 0)
    value, slope = 0.0, torch.zeros_like(POLICY)
    for y in range(len(POLICY)):
        logits = POLICY.clone().requires_grad_()
        term = estimate_kl(logits.log_softmax(0)[y], REFERENCE.log_softmax(0)[y], kl_type, estimator, corrected)
        (d,) = torch.autograd.grad(term, logits)
        value, slope = value + weight[y].item() * term.item(), slope + weight[y] * d
    return value, slope


def true_gradient(kl_type: str) -> Tensor:
    logits = POLICY.clone().requires_grad_()
    return torch.autograd.grad(true_kl(logits, kl_type), logits)[0]


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kl_type: str, estimator: str) -> None:
    assert expected(kl_type, estimator, True)[0] == pytest.approx(true_kl(POLICY, kl_type).item(), abs=1e-12)


@pytest.mark.parametrize("kl_type", KL_TYPES)
def test_k2_is_biased_but_right_to_second_order(kl_type: str) -> None:
    assert abs(expected(kl_type, "k2", True)[0] - true_kl(POLICY, kl_type).item()) > 0.01
    near = REFERENCE + 1e-3 * POLICY
    p, d = near.softmax(0), REFERENCE.log_softmax(0) - near.log_softmax(0)
    k2 = (p * estimate_kl(near.log_softmax(0), REFERENCE.log_softmax(0), kl_type, "k2")).sum()
    assert k2.item() == pytest.approx((p * d**2 / 2).sum().item(), rel=1e-12)
    assert k2.item() == pytest.approx(true_kl(near, kl_type).item(), rel=1e-2)


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_corrected_gradients_are_unbiased(kl_type: str, estimator: str) -> None:
    assert torch.allclose(expected(kl_type, estimator, True)[1], true_gradient(kl_type), atol=1e-12)


RIGHT_WITHOUT_CORRECTION = {("policy_to_reference", "k2")}


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_without_correction_are_right_only_where_said(kl_type: str, estimator: str) -> None:
    error = (expected(kl_type, estimator, False)[1] - true_gradient(kl_type)).abs().max().item()
    assert error < 1e-12 if (kl_type, estimator) in RIGHT_WITHOUT_CORRECTION else error > 1e-2


def test_the_two_uncorrected_gradients_that_mislead() -> None:
    assert expected("policy_to_reference", "k1", False)[1].abs().max() < 1e-12
    assert torch.allclose(
        expected("policy_to_reference", "k3", False)[1], true_gradient("reference_to_policy"), atol=1e-12
    )


def test_k3_is_never_negative_and_nothing_overflows() -> None:
    gap = torch.linspace(-200, 200, 401)
    for kl_type in KL_TYPES:
        values = estimate_kl(-gap, torch.zeros(401), kl_type, "k3")
        assert (values >= 0).all()
        assert values.isfinite().all()


def test_multiplicative_control_by_hand() -> None:
    control = KLController(0.1, "multiplicative", target=0.04, minimum=0.05, maximum=0.3, interval=1)
    betas = []
    for kl in (0.061, 0.059, 0.0266, 0.0267, 0.0, 1.0, 1.0, 1.0, 1.0, math.nan):
        control.update(kl)
        betas.append(control.beta)
    expectation = [0.15, 0.15, 0.1, 0.1, 0.1 / 1.5, 0.1, 0.15, 0.225, 0.3, 0.3]
    assert betas == pytest.approx(expectation)
    of_three = KLController(0.1, "multiplicative", target=0.04, interval=3)
    for kl in (1.0, 0.0, 0.0, 0.04, 0.04):  # mean 0.33, then two of three steps
        of_three.update(kl)
    assert of_three.beta == pytest.approx(0.15)


def test_warmup_ramps_and_holds_the_controller() -> None:
    control = KLController(0.2, "multiplicative", target=0.01, warmup_steps=4, interval=1)
    seen = []
    for _ in range(5):
        seen.append(control.coefficient)
        control.update(1.0)
    assert seen == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert control.beta == pytest.approx(0.3)


def driven(beta: KLController) -> list[float]:
    """KL of a toy policy over five tokens, pulled by a reward towards one of them.

    The pull grows over the run, so no fixed beta would do.
    """
    logits, history = REFERENCE.clone(), []
    reward = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    for step in range(400):
        logits.requires_grad_()
        p = logits.softmax(0)
        drive = (1 + step / 200) * (p * reward).sum()
        kl = (p * (logits.log_softmax(0) - REFERENCE.log_softmax(0))).sum()
        (slope,) = torch.autograd.grad(beta.coefficient * kl - drive, logits)
        logits = (logits - 0.3 * slope).detach()
        beta.update(kl.item())
        history.append(kl.item())
    return history


def test_adaptive_beta_holds_a_driven_kl_for_100_steps() -> None:
    """Under the controller's start value, fixed, the same drive leaves the band."""
    last = driven(KLController(0.5, "multiplicative", target=0.1, factor=1.2, minimum=1e-3, maximum=100))[-100:]
    assert all(abs(kl - 0.1) <= 0.03 for kl in last)
    assert len({round(kl, 6) for kl in last}) > 1
    assert any(abs(kl - 0.1) > 0.03 for kl in driven(KLController(0.5))[-100:])
