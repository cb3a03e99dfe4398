"""Each gate fails on a fault planted in our trainer, and passes without; TRL's own is in `test_first_batch.py`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rookworld_trl.training import GateError, RookWorldGRPOTrainer, gates
from rookworld_trl.training.sampler import Drawn, Samples

Make = Callable[..., Any]
FLOAT32 = gates.Bounds.for_precision(mixed=False)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ours_passes_all_of_them(make_trainer: Make, temperature: float) -> None:
    results = {result.gate: result for result in gates.examine(make_trainer(temperature=temperature))}
    assert all(result.passed for result in results.values())
    assert set(results) == set(gates.GATES)
    assert results["sampler"].measured < 1e-5
    assert results["reference"].measured == 0


def remove_position_hooks(trainer: RookWorldGRPOTrainer) -> None:
    trainer.model.transformer._forward_pre_hooks.clear()
    trainer.ref_model.transformer._forward_pre_hooks.clear()


def switch_dropout_on(trainer: RookWorldGRPOTrainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1


def move_reference(trainer: RookWorldGRPOTrainer) -> None:
    with torch.no_grad():
        trainer.ref_model.transformer.wte.weight.mul_(1.05)


def retokenise(trainer: RookWorldGRPOTrainer) -> None:
    sample = trainer._generate

    def resampled(prompts: list[str]) -> Any:
        prompt_ids, completion_ids, *rest = sample(prompts)
        return prompt_ids, [[ids[0], *ids] for ids in completion_ids], *rest

    trainer._generate = resampled


def sample_warmer(trainer: RookWorldGRPOTrainer) -> None:
    """The fused head keeps 1.0, the sampler runs at 2.0."""
    trainer.args.temperature = 2.0


@pytest.mark.parametrize(
    ("fault", "gate"),
    [
        (remove_position_hooks, "padding"),
        (switch_dropout_on, "dropout"),
        (move_reference, "reference"),
        (retokenise, "sampled_ids"),
        (sample_warmer, "temperature"),
        (sample_warmer, "sampler"),
    ],
)
def test_a_fault_is_refused_before_any_update(make_trainer: Make, fault: Callable[[Any], None], gate: str) -> None:
    """These are faults of the model's own forward pass; `test_scoring.py` has one of the shared scoring."""
    trainer = make_trainer(learning_rate=1e-2, share_prefixes=False)
    fault(trainer)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(GateError, match=rf"gate '{gate}' FAILS: measured \S+, bound \S+\. \w+") as caught:
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert gate in {result.gate for result in caught.value.results if not result.passed}


def test_padding_gate_needs_no_padding_in_the_batch(make_trainer: Make) -> None:
    """Prompts of equal length would hide the fault for a batch; the gate adds columns of its own."""
    trainer = make_trainer(share_prefixes=False)
    trainer.train_dataset = trainer.train_dataset.select([0, 2, 5, 0, 2, 5, 0, 2])
    remove_position_hooks(trainer)
    with pytest.raises(GateError, match="'padding' FAILS"):
        trainer.train()


def test_nan_never_passes() -> None:
    assert not gates.GateResult("x", math.nan, 1.0, "").passed
    sampled = Samples([[1], [1]], [[2], [2]], [Drawn([math.nan]), Drawn([-1.0])])
    logps, mask = torch.tensor([[-1.0], [-1.0]]), torch.ones(2, 1)
    assert math.isnan(gates.sampler_gate(sampled, logps, mask, FLOAT32).measured)


def test_sampler_gate_without_any_record_does_not_pass() -> None:
    sampled = Samples([[1]], [[2]], [None])
    assert not gates.sampler_gate(sampled, torch.tensor([[-1.0]]), torch.ones(1, 1), FLOAT32).passed


def test_reference_gate_by_hand() -> None:
    """k3 at ref - policy = ln 2 is 2 - ln 2 - 1; a masked token does not count."""
    logps, reference = torch.tensor([[-2.0, -1.0]]), torch.tensor([[-2.0 + math.log(2), 50.0]])
    result = gates.reference_gate(logps, reference, torch.tensor([[1, 0]]), FLOAT32)
    assert result.measured == pytest.approx(1 - math.log(2), abs=1e-6)


def test_mixed_precision_measures_the_mean() -> None:
    """One token off by half a nat is a rounding step of bf16; half a nat at every token is not."""
    mixed = gates.Bounds.for_precision(mixed=True)
    deviations = torch.zeros(100)
    deviations[0] = 0.5
    assert FLOAT32.measure(deviations) == 0.5
    assert mixed.measure(deviations) == pytest.approx(0.005)
    assert mixed.measure(deviations) < mixed.logp < mixed.measure(deviations + 0.5)
    assert math.isnan(mixed.measure(torch.tensor([math.nan, 0.0])))
    assert math.isnan(FLOAT32.measure(torch.tensor([0.0, math.nan])))


def test_wrong_positions_fail_under_bf16_too(make_trainer: Make) -> None:
    trainer = make_trainer(bf16=True, share_prefixes=False)
    remove_position_hooks(trainer)
    with pytest.raises(GateError, match="'padding' FAILS"):
        trainer.train()


def test_ours_passes_under_bf16(make_trainer: Make) -> None:
    make_trainer(bf16=True).train()
    make_trainer(bf16=True, rollout_backend="native").train()
