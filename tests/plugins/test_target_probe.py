"""The truth's log-prob against an unpadded count, and its gain in a run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.completions import target_logps
from rookworld_trl.plugins.target_probe import TargetProbe
from tests.support.plugged import plugin_of


def test_truth_logps_equal_unpadded_scoring(policy: GPT2LMHeadModel) -> None:
    policy.eval()
    rows = [([20, 21, 22, 23, 24], [3]), ([5, 6, 7], [8]), ([4], [11, 12, 13, 14])]  # not in the order of lengths
    expected = []
    for prompt, target in rows:
        with torch.no_grad():
            logps = policy(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        expected.append(sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(target)))
    assert target_logps(policy, rows, pad_token_id=0, batch_size=2).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def answered(prompts: Dataset) -> Dataset:
    return prompts.add_column("target", ["aa", "b", "h1h2", "k", "q", "r", "ee", "f"])


def test_the_gain_is_measured_from_the_start_every_so_many_steps(
    make_trainer: Callable[..., Any], answered: Dataset
) -> None:
    """On rows spread evenly; it is 0 before the first update has moved anything."""
    trainer = make_trainer(target_rows=4, target_every=2, learning_rate=1e-2, max_steps=4, _data=answered)
    probe = plugin_of(trainer, TargetProbe)
    tokenizer = trainer.processing_class
    texts = [(tokenizer.decode(prompt), tokenizer.decode(truth[:-1])) for prompt, truth in probe.pairs]
    assert texts == [(answered[i]["prompt"], answered[i]["target"]) for i in (0, 2, 4, 6)]
    assert {truth[-1] for _, truth in probe.pairs} == {tokenizer.eos_token_id}
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert ["truth/logp" in row for row in log] == [False, True, False, True]
    assert all(row["truth/logp_gain"] == pytest.approx(row["truth/logp"] - probe.before) for row in log[1::2])
    assert log[1]["truth/logp_gain"] != 0


def test_rows_that_cannot_be_followed_are_left_out(make_trainer: Callable[..., Any], answered: Dataset) -> None:
    assert plugin_of(make_trainer(target_rows=4), TargetProbe).pairs == []
    trainer = make_trainer(target_rows=4, _data=answered)
    trainer.model.config.n_positions = 7  # `P: a` and `aa` with its end token
    probe = TargetProbe(target_rows=4)
    probe.attach(trainer)
    assert [len(prompt) + len(truth) for prompt, truth in probe.pairs] == [7]
    assert not TargetProbe(target_rows=0).on
