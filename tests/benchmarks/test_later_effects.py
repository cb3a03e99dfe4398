"""The estimator of what the exact gradient leaves out: by hand, and without bias on a policy of two outcomes."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks.later_effects import credit, products


def test_a_token_is_credited_with_what_stands_behind_it() -> None:
    """Two points of the first sample at tokens 0 and 2, of the second at 0 alone: it lacks the second one."""
    found = credit([[1.0, 4.0], [3.0]], [[0, 2], [0]], [3, 2])
    # From the other sample's: 1 - 3 before token 0, which is nowhere; 4 - 0 before token 2; 0 - 4 in all of the second.
    np.testing.assert_allclose(found, [[4.0, 4.0, 0.0], [-4.0, -4.0, 0.0]])


def test_credit_times_scores_is_the_gradient_that_is_left_out() -> None:
    """A first token 0 or 1 with logits (0, x), then a decision worth 2 behind 0 and 5 behind 1: d E / dx = 3 p (1 - p).

    The mean over all pairs of samples, weighted by their probabilities, is that without any error.
    """
    p = 0.3
    probs, worth, score = {0: 1 - p, 1: p}, {0: 2.0, 1: 5.0}, {0: -p, 1: 1 - p}
    mean = 0.0
    for pair in itertools.product((0, 1), repeat=2):
        given = credit([[worth[each]] for each in pair], [[1], [1]], [2, 2])[:, 0]
        mean += (
            probs[pair[0]] * probs[pair[1]] * np.mean([g * score[each] for g, each in zip(given, pair, strict=True)])
        )
    assert mean == pytest.approx(3 * p * (1 - p))


def test_norms_and_angles_are_those_without_noise() -> None:
    """Halves whose noises stand at right angles to everything: the norms 3 and 4 at right angles are found again."""
    axes = torch.eye(6)
    signal = torch.stack([3 * axes[0], 4 * axes[1]])
    noise = torch.stack([2 * axes[2], 2 * axes[3]])
    found = products(torch.stack([signal + noise, signal + 2 * torch.stack([axes[4], axes[5]])]))
    assert found["cosine of computed and whole"] == pytest.approx(0.6)
    assert found["left out / whole"] == pytest.approx(0.8)
    assert found["left out / computed"] == pytest.approx(4 / 3)
    assert found["cosine of computed and left out"] == pytest.approx(0)
    assert found["noise of left out / its norm"] == pytest.approx(2**0.5 / 4)  # of the mean of two, 2 each
    assert found["cosine of the halves, computed"] == pytest.approx(9 / 13)
