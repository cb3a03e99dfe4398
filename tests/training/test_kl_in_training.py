"""The KL controls act on the loss, on the reference and on the run, and survive a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from rookworld_trl.checkpointing import store
from rookworld_trl.training import RookWorldGRPOTrainer
from rookworld_trl.training.loss import LOSS_TYPES

Make = Callable[..., RookWorldGRPOTrainer]


def ready(trainer: RookWorldGRPOTrainer, drift: float = 0.05) -> tuple[RookWorldGRPOTrainer, dict[str, Any]]:
    """A trainer inside its first step, with a batch, and with a policy that has left its reference."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(drift * torch.randn_like(parameter))
    trainer.gates.pending = False
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradient(compute: Callable[..., Any], trainer: Any, inputs: Any) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = compute(trainer, trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(("corrected", "off_policy"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_to_reference_k3_is_trls_own_penalty(
    make_trainer: Make, loss_type: str, corrected: bool, off_policy: bool
) -> None:
    """Value and gradient, with an accumulation of 2, so that every normalisation is TRL's own."""
    trainer, inputs = ready(
        make_trainer(beta=0.7, use_bias_correction_kl=corrected, loss_type=loss_type, gradient_accumulation_steps=2)
    )
    if off_policy:  # as if the samples came from the reference
        inputs["old_per_token_logps"] = inputs["ref_per_token_logps"]
    ours, our_gradient = loss_and_gradient(RookWorldGRPOTrainer._compute_loss, trainer, inputs)
    theirs, their_gradient = loss_and_gradient(GRPOTrainer._compute_loss, trainer, inputs)
    trainer.beta = 0.0
    without, _ = loss_and_gradient(GRPOTrainer._compute_loss, trainer, inputs)
    assert abs(theirs - without) > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_the_coefficient_in_force_moves_the_loss(make_trainer: Make) -> None:
    trainer, inputs = ready(make_trainer(beta=0.5, loss_type="bnpo"))
    losses = {}
    for beta in (0.0, 0.5, 1.5):
        trainer.kl.controller.beta = beta
        losses[beta] = trainer._compute_loss(trainer.model, inputs).item()
    mean_kl = trainer._metrics["train"]["kl"][0]
    assert mean_kl > 1e-3
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * mean_kl, rel=1e-4)
    assert losses[1.5] - losses[0.0] == pytest.approx(1.5 * mean_kl, rel=1e-4)
    assert trainer.beta == 0.5  # what TRL reads to score the reference


def test_adaptive_beta_and_warmup_are_logged(make_trainer: Make) -> None:
    trainer = make_trainer(
        beta=0.1, kl_control="multiplicative", kl_target=1e-6, kl_interval=1, kl_warmup_steps=2, max_steps=5,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    used = [entry["kl/coefficient"] for entry in trainer.state.log_history if "kl/coefficient" in entry]
    assert used == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.225])


def test_accumulation_meters_the_whole_step(make_trainer: Make) -> None:
    """Two micro-batches: one measurement and one adaptation for each optimizer step."""
    trainer = make_trainer(gradient_accumulation_steps=2, kl_control="multiplicative", kl_target=1e-6, kl_interval=1)
    trainer.train()
    assert trainer.kl.controller.steps == trainer.state.global_step == 2


def test_a_checkpoint_without_our_state_is_refused(make_trainer: Make, options: dict[str, Any]) -> None:
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    folder = Path(options["output_dir"]) / "checkpoint-1"
    state = json.loads((folder / "rookworld_state.json").read_text())
    del state["kl_controller"]
    (folder / "rookworld_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed from: rookworld_state.json has \d+ bytes"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))
    store.commit(folder.rename(folder.with_name("staged")), folder)  # as if written like that
    with pytest.raises(ValueError, match=r"rookworld_state.json: field 'kl_controller' is missing; resume from"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))
    (folder / "rookworld_state.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be resumed from: rookworld_state.json is missing"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))
