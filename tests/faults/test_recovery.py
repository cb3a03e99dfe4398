"""Every fault that passes is recovered from, with the weights finite after every step; one that stays ends the run."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rookworld_trl.checkpointing.resume import scale_learning_rate
from rookworld_trl.checkpointing.store import newest_valid
from rookworld_trl.modeling.hooks import finite_logits
from rookworld_trl.training import RookWorldGRPOTrainer
from rookworld_trl.training.recovery import GOOD_STEPS, Diverged, copy_tree, finite
from tests.support.injection import STATE, Injector, hash_of
from tests.support.toy import make_trainer

NAN, INF = math.nan, math.inf

# Kinds, in the order of their steps, with what must be found; further findings of the same step are fine.
KINDS = {
    "loss": "loss",
    "loss value": "loss",
    "gradient": "gradient",
    "late gradient": "weights",
    "weight": "weights",
    "unused weight": "weights",
    "huge weights": "sampling",
    "moments": "weights",
    "rewards": "rewards",
}


def run_with(plan: list[tuple[int, int, str]], folder: Path, **options: Any) -> tuple[RookWorldGRPOTrainer, Injector]:
    last = max(step for _, step, _ in plan) + 3
    settings = {"max_steps": last, "save_strategy": "no", "lr_scheduler_type": "constant", **options}
    trainer = make_trainer(folder, **settings)
    injector = Injector(trainer, plan)
    trainer.train()
    return trainer, injector


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "recovery.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(kinds: Any, every: int = 4) -> list[tuple[int, int, str]]:
    return [(0, 1 + every * number, kind) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (KINDS, {}),
        pytest.param(
            {"coefficient": "loss", "sampling": "sampling"},
            {"rollout_backend": "transformers", "mining": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"value head": "loss", "loss": "loss"},
            {"use_gae": True, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss": "loss", "weight": "weights"},
            {"num_iterations": 2, "advantage_baseline": "ema"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["native", "transformers", "value head", "reused batches"],
)
def test_faults_that_pass(kinds: dict[str, str], options: dict[str, Any], tmp_path: Path) -> None:
    plan = spread(kinds)
    trainer, injector = run_with(plan, tmp_path, **options)
    found = events(tmp_path)
    assert [(event["step"], event["attempt"]) for event in found] == [(step, 1) for _, step, _ in plan]
    for event, name in zip(found, kinds.values(), strict=True):
        assert name in event["faults"], event
    assert all(injector.finite.values())
    assert trainer.state.global_step == len(injector.finite) == plan[-1][1] + 3
    assert len(set(list(injector.hashes.values())[-3:])) == 3  # it goes on learning
    moments = list(trainer.optimizer.state_dict()["state"].values())
    assert all(finite(each.values()) for each in moments)
    assert finite(trainer.ref_model.parameters())
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


def test_without_recovery_the_same_fault_poisons(tmp_path: Path) -> None:
    """The guard of the test above: the faults are real."""
    settings = {"max_steps": 1, "recovery": False, "logging_nan_inf_filter": False}
    trainer, injector = run_with([(0, 1, "loss")], tmp_path, **settings)
    assert injector.finite == {1: False}
    assert math.isnan(trainer.state.log_history[0]["loss"])  # not hidden


def test_a_run_without_faults_is_the_same_run(tmp_path: Path) -> None:
    ends = []
    for recovery in (True, False):
        trainer = make_trainer(tmp_path / str(recovery), save_strategy="no", recovery=recovery)
        trainer.train()
        ends.append(hash_of(list(trainer.model.state_dict().values())))
    assert ends[0] == ends[1]
    assert not (tmp_path / "True" / "recovery.jsonl").exists()


def test_back_to_the_last_state_that_had_a_good_step_after_it(tmp_path: Path) -> None:
    """Step 5 is skipped: the state after 4 has proved nothing yet, that after 3 has."""
    trainer, injector = run_with([(0, 5, "loss")], tmp_path, recovery_snapshot_steps=1, learning_rate=1e-2)
    hashes = injector.hashes
    assert hashes[5] == hashes[3]
    assert len({hashes[step] for step in (1, 2, 3, 4, 6, 7)}) == 6
    assert injector.rates == pytest.approx({1: 1e-2, 2: 1e-2, 3: 1e-2, 4: 1e-2, 5: 5e-3, 6: 5e-3, 7: 5e-3, 8: 5e-3})
    assert events(tmp_path)[0]["back_to_step"] == 3
    assert trainer.guard.state_dict() == {"scale": 0.5}


def test_moments_and_controls_go_back_too(tmp_path: Path) -> None:
    """With everything on that learns or counts: no interval is over before the fault, so that each has moved."""
    counting = {"lr_control": "kl", "kl_interval": 9}
    learning = {"advantage_baseline": "ema", **counting}
    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="no", recovery_snapshot_steps=1, **learning)
    seen: dict[int, Any] = {}

    class Watch(Injector):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            controls = [each.state_dict() for each in trainer.guard.controls.values()]
            assert len(controls) == 2
            seen[state.global_step] = copy_tree((trainer.optimizer.state_dict()["state"], controls))

    Watch(trainer, [(0, 5, "gradient")])
    trainer.train()
    before, after = seen[3], seen[5]
    assert after[1] == before[1]
    assert all(now != then for now, then in zip(seen[4][1], before[1], strict=True))
    for name, value in before[0].items():
        assert all(torch.equal(after[0][name][key], tensor) for key, tensor in value.items()), name


def test_a_skipped_step_does_not_count_for_the_rate(tmp_path: Path) -> None:
    """Steps 2 and 3 are above the KL's band, so the rate is halved; 5 is undone, for which the guard halves it; with 4
    and 6 it is halved again, and with 7 and 8."""
    settings = {"lr_control": "kl", "kl_target": 1e-9, "kl_interval": 2, "recovery_snapshot_steps": 1}
    trainer, injector = run_with([(0, 5, "gradient")], tmp_path, **settings)
    rates = {1: 1e-2, 2: 1e-2, 3: 5e-3, 4: 5e-3, 5: 2.5e-3, 6: 1.25e-3, 7: 1.25e-3, 8: 6.25e-4}
    assert injector.rates == pytest.approx(rates)
    assert trainer.plugins[0].state_dict() == {"scale": 0.125, "above": 0, "within": 0}
    assert trainer.guard.scale == 0.5


def test_the_fourth_failure_in_a_row_ends_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=9, save_strategy="no")
    injector = Injector(trainer, [(0, step, "loss") for step in (2, 3, 4, 5)])
    with pytest.raises(Diverged, match="training diverged at step 5: loss and gradient not finite") as caught:
        trainer.train()
    error = caught.value
    assert (error.exit_code, error.step) == (4, 5)
    assert "recovery_max_attempts" in str(error)
    assert "Resume with `--recovery_mode`" in str(error)
    assert finite(trainer.model.parameters())
    assert [event["attempt"] for event in events(tmp_path)] == [1, 2, 3, 4]
    assert injector.rates == pytest.approx({1: 1e-2, 2: 5e-3, 3: 2.5e-3, 4: 1.25e-3}, rel=1)
    assert trainer.guard.scale == 1 / 8  # and no lower


@pytest.mark.parametrize(("value", "recovery"), [(NAN, True), (None, False)])
def test_rewards_that_are_no_numbers_end_the_run_and_are_named(value: Any, recovery: bool, tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[Any]:
        return [value] * len(completions)

    trainer = make_trainer(tmp_path, reward=reward, max_steps=9, save_strategy="no", recovery=recovery)
    with pytest.raises(Diverged, match="rewards") as caught:
        trainer.train()
    assert caught.value.step == (4 if recovery else 1)
    assert "reward function" in str(caught.value)
    assert "learning_rate" not in str(caught.value)
    assert "recovery_mode" not in str(caught.value)
    assert finite(trainer.model.parameters())


def test_a_state_of_no_use_is_refused_at_the_start(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="no")
    STATE["weight"](trainer)
    with pytest.raises(Diverged, match=r"weights not finite\. There is no good state"):
        trainer.train()


@pytest.mark.parametrize(("save_strategy", "steps"), [("steps", 3), ("no", 3), ("no", 6)])
def test_weights_broken_behind_a_step(save_strategy: str, steps: int, tmp_path: Path) -> None:
    """Neither the checkpoint of that step nor the model in memory has them, nor the step after they were evaluated."""
    trainer = make_trainer(tmp_path, max_steps=steps, save_strategy=save_strategy)

    class Late(Injector):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 3:
                STATE["weight"](trainer)
                if steps > 3:
                    trainer.evaluate(trainer.train_dataset.select(range(8)))
                    trainer.model.train()

    injector = Late(trainer, [])
    trainer.train()
    assert all(injector.finite.values())
    assert finite(trainer.model.parameters())
    assert [event["faults"] for event in events(tmp_path)] == [["weights"]]
    if save_strategy == "steps":
        assert newest_valid(tmp_path) == tmp_path / "checkpoint-3"  # which looks at the weights


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_random_faults_are_recovered_from(seed: int, tmp_path: Path) -> None:
    """Ten faults of random kinds, some steps apart; of a day when it ran, `benchmarks/results/faults.json` tells."""
    dice, step, plan = random.Random(seed), 0, []
    for _ in range(10):
        step += dice.randint(GOOD_STEPS + 1, 4 * GOOD_STEPS)
        plan.append((0, step, dice.choice(sorted([*KINDS, "coefficient"]))))
    trainer, injector = run_with(plan, tmp_path, seed=seed)
    assert trainer.state.global_step == step + 3
    assert all(injector.finite.values())
    assert {event["step"] for event in events(tmp_path)} == {step for _, step, _ in plan}


# The parts


def test_a_cut_outlasts_the_schedule() -> None:
    """Linear from 1 to 0 over 10 steps; halved after 2 of them and after 4."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    rates = []
    for step in range(1, 6):
        weight.grad = torch.zeros(1)
        optimizer.step()
        if step in (2, 4):
            scale_learning_rate(optimizer, schedule, 0.5)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.9, 0.4, 0.35, 0.15, 0.125])


def test_logits_that_are_no_distribution_are_repaired() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Identity()

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Toy()
    good, banned = [0.5, -1.0], [1.0, -INF]
    with finite_logits(model) as repaired:
        assert model.head(torch.tensor([[good, banned]])).tolist() == [[good, banned]]
        assert model.head(torch.tensor([[good], [[NAN, 1.0]]])).tolist() == [[good], [[0, 0]]]
        assert model.head(torch.tensor([[INF, 1.0], [-INF, -INF]])).tolist() == [[0, 0], [0, 0]]
    assert [bool(each) for each in repaired] == [False, True, True]
    assert torch.isnan(model.head(torch.tensor([NAN]))).all()  # the hook is gone
