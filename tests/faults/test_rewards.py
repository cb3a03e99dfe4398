"""Whatever reward functions return or raise: nothing is poisoned, all is counted, errors keep their traceback."""

import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rookworld_trl.chess.rewards import policy_reward
from rookworld_trl.modeling.completions import CUT_OFF
from rookworld_trl.training.gates import FirstBatch
from rookworld_trl.training.recovery import finite
from rookworld_trl.training.sampler import Sampler, Samples
from rookworld_trl.training.trainer import screened
from tests.support.toy import make_trainer

KL_TYPES = ("policy_to_reference", "reference_to_policy", "symmetric")
KL_ESTIMATORS = ("k1", "k2", "k3")
NAN, INF = math.nan, math.inf
FEN = "4k3/8/8/8/8/8/8/4K2R w K - 0 1"


def test_screening_by_hand() -> None:
    given = torch.tensor([[1.0, NAN], [INF, NAN], [NAN, -INF], [11.0, -1e30], [-0.5, INF]])
    found, counts = screened(given, 10.0)
    assert found.nan_to_num(nan=99.0).tolist() == [[1, 99], [99, 99], [99, 99], [10, -10], [-0.5, 99]]
    assert counts == {"not_finite": 2, "clamped": 2}
    assert screened(torch.zeros(2, 1), 10.0)[1] == {}


def train_with(folder: Path, reward: Any, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    """Train two steps; the trainer and the advantages of its batches."""
    trainer = make_trainer(folder, reward=reward, save_strategy="no", **{"max_steps": 2, **options})
    advantages, generate = [], trainer._generate_and_score_completions

    def watched(inputs: Any) -> Any:
        batch = generate(inputs)
        advantages.append(batch["advantages"])
        return batch

    trainer._generate_and_score_completions = watched
    trainer.train()
    return trainer, advantages


@pytest.mark.parametrize(("scale", "baseline"), [("none", "group_mean"), ("group", "group_mean"), ("batch", "ema")])
def test_absurd_rewards_in_training(scale: str, baseline: str, tmp_path: Path) -> None:
    """Groups of two: an infinite reward beside a good one, a NaN beside an infinite one, two huge ones."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [INF, 0.25, NAN, -INF, 1e30, -1e30, 0.5, 0.75]

    options = {"scale_rewards": scale, "advantage_baseline": baseline, "per_device_train_batch_size": 8}
    trainer, advantages = train_with(tmp_path, reward, reward_limit=10.0, **options)
    assert finite(trainer.model.parameters())
    assert not (tmp_path / "recovery.jsonl").exists()
    for batch in advantages:
        assert batch.isfinite().all()
        assert batch[[0, 2, 3]].tolist() == [0, 0, 0]
        if (scale, baseline) == ("none", "group_mean"):
            assert batch.tolist() == [0, 0, 0, 0, 10, -10, -0.125, 0.125]
    first = trainer.state.log_history[0]
    assert (first["rewards/not_finite"], first["rewards/clamped"]) == (3, 2)
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


def test_a_batch_that_no_function_answers_is_a_step_that_is_skipped(tmp_path: Path) -> None:
    batches = []

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        batches.append(len(completions))
        return [None if len(batches) == 2 else float(row) for row, _ in enumerate(completions)]

    trainer, advantages = train_with(tmp_path, reward, max_steps=3)
    events = [json.loads(line) for line in (tmp_path / "recovery.jsonl").read_text().splitlines()]
    assert [(each["step"], each["faults"], each["back_to_step"]) for each in events] == [(2, ["rewards"], None)]
    assert [bool(batch.any()) for batch in advantages] == [True, False, True]
    assert finite(trainer.model.parameters())


def broken(completions: list[str], **_: Any) -> list[float]:
    raise ZeroDivisionError("on purpose")


async def broken_later(completions: list[str], **_: Any) -> list[float]:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("function", [broken, broken_later])
def test_an_exception_keeps_its_traceback(function: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, reward=function, save_strategy="no")
    before = [each.detach().clone() for each in trainer.model.parameters()]
    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        trainer.train()
    assert 'raise ZeroDivisionError("on purpose")' in "".join(traceback.format_tb(caught.value.__traceback__))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.reward_funcs == [function]  # not the wrapper


# The KL where exp overflows (float32: above 88)


@pytest.mark.parametrize("kl_type", KL_TYPES)
def test_a_far_reference_gives_finite_loss_and_gradient(kl_type: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kl_type=kl_type, beta=0.1, share_prefixes=False, save_strategy="no")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    reference = inputs["ref_per_token_logps"].clone()
    inputs["completion_mask"] = inputs["completion_mask"].clone()
    inputs["completion_mask"][:, -1] = 0
    for estimator in KL_ESTIMATORS:
        trainer.args.kl_estimator = estimator
        for corrected in (True, False):
            trainer.args.use_bias_correction_kl = corrected
            for place in (slice(None), slice(-1, None)):  # everywhere, and where it is masked
                for shift in (100.0, -1e4):
                    inputs["ref_per_token_logps"] = reference.clone()
                    inputs["ref_per_token_logps"][:, place] += shift
                    trainer.model.zero_grad()
                    loss = trainer._compute_loss(trainer.model, inputs)
                    loss.backward()
                    where = (estimator, corrected, place, shift)
                    assert loss.isfinite(), where
                    assert finite(each.grad for each in trainer.model.parameters() if each.grad is not None), where


# Completions that say nothing


def test_empty_and_padding_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[str]] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        texts.append(completions)
        return [0.0, 1.0, 0.0, 1.0]

    def sample(self: Any, prompt_ids: Any, *_: Any, **__: Any) -> Samples:
        logps = [[], [-1.0] * 4, [-1.0], [-1.0, -1.0]]
        return Samples(prompt_ids, [[], [0, 0, 0, 0], [1], [5, 6]], list(logps), list(logps))

    monkeypatch.setattr(Sampler, "sample", sample)
    monkeypatch.setattr(FirstBatch, "measure", lambda *_: [])  # it compares with a real sampler
    trainer, advantages = train_with(tmp_path, reward)
    assert texts[0][:3] == ["", "<pad>" * 4 + CUT_OFF, ""]
    assert len(texts[0][3]) == 2 + len(CUT_OFF)
    assert finite(trainer.model.parameters())
    assert not (tmp_path / "recovery.jsonl").exists()
    assert all(batch.isfinite().all() and batch.any() for batch in advantages)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["completions/min_length"] for row in rows] == [1, 1]  # the end token
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_values_in_the_data_that_are_no_numbers_are_named() -> None:
    for value in (NAN, INF, None, "12"):
        columns = {"legal_moves": [["e1e2", "h1h8"]], "legal_cp": [[10, value]]}
        with pytest.raises(ValueError, match=r"legal_cp.*row 0"):
            policy_reward([f"P: {FEN}"], [" M: e1e2 h1h8 E: 0.1 3.0 B: h1h8"], **columns)


def test_a_conversation_gets_its_completion_as_a_message(tmp_path: Path) -> None:
    """As TRL gives it, with all of the text that was sampled; a prompt of plain text gets plain text."""
    seen: list[Any] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, reward=reward)
    ids = [[*trainer.processing_class("a1")["input_ids"], trainer.eos_token_ids[0]]] * 2
    trainer._screened([{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": "a"}], ids)
    assert seen == [[{"role": "assistant", "content": "a1"}], "a1"]
