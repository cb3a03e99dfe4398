"""Prompt mining: chances by hand, exact task shares, pass rates that survive a resume, and more informative groups."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from rookworld_trl.plugins import mining
from rookworld_trl.plugins.mining import Mining, PromptMiner, informative_chance, prompt_key
from rookworld_trl.training import RookWorldGRPOTrainer, sampler
from tests.support.plugged import plugin_of

NAN = float("nan")


def miner(prompts: str = "abcdefgh", tasks: str = "xxxxyyyy", **options: Any) -> PromptMiner:
    return PromptMiner(list(prompts), list(tasks), **{"samples": 2} | options)


def test_useful_chance_by_hand() -> None:
    assert informative_chance(0.0, 4) == informative_chance(1.0, 4) == 0
    assert informative_chance(0.5, 2) == 0.5
    assert informative_chance(0.9, 3) == pytest.approx(1 - 0.729 - 0.001)


def test_pass_rates_are_exponential_averages() -> None:
    known = miner()
    known.observe(["a", "b", "c"], ["x", "x", "x"], np.array([1.0, 0.5, 1.0, 1.0, NAN, NAN]))
    a, b = map(prompt_key, "ab")  # one of a's completions passes, both of b's
    assert (known.pass_rates, known.shares) == ({a: 0.5, b: 1.0}, {b: 0.0})
    known.observe(["a", "b"], ["x", "x"], np.array([0.0, 0.0, 0.2, 0.4]))  # b's differ, though none passes
    assert (known.pass_rates, known.shares) == ({a: 0.25, b: 0.5}, {a: 0.0, b: 0.5})
    known.set_pass_rate(1, 0.5)
    assert (known.pass_rates[b], known.shares[b]) == (0.5, 0.5)
    assert known.weight(1, "x") == pytest.approx(0.5 + 0.5 * 0.5)


def test_an_exact_pass_rate_takes_nothing_from_what_graded_rewards_have_shown() -> None:
    """Completions that never pass and differ all the same: hard prompts, with a gradient."""
    known = miner("abcd", "xxxx", samples=4)
    known.observe(["a", "b"], ["x", "x"], np.array([0.2, 0.4, 0.2, 0.2, -0.3, -0.3, -0.3, -0.3]))
    for row in range(4):
        known.set_pass_rate(row, 1e-5)
    assert known.weight(0, "x") == pytest.approx(1.0)
    assert known.weight(1, "x") == pytest.approx(informative_chance(1e-5, 4), rel=1e-3)
    assert known.weight(2, "x") == pytest.approx(
        0.99 / 1.99, rel=1e-3
    )  # as often as others of its task: the first of two


def test_under_pass_or_fail_the_exact_pass_rate_decides() -> None:
    """A group that was mixed by luck says nothing beyond its pass rate."""
    known = miner("abcd", "xxxx", samples=4)
    known.observe(["a", "b"], ["x", "x"], np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    for row in range(4):
        known.set_pass_rate(row, 1e-5)
    for row in range(4):
        assert known.weight(row, "x") == pytest.approx(4e-5, rel=1e-3)


def test_unknown_prompts_are_expected_to_be_as_informative_as_others_were() -> None:
    known = miner()
    assert known.weight(0, "x") == 1.0
    known.observe(["a", "b"], ["x", "x"], np.array([1.0, 1.0, 1.0, 1.0]))
    assert known.weight(2, "x") == pytest.approx(0.95**2)
    assert known.weight(4, "y") == 1.0
    assert 0 < known.weight(0, "x") < 1e-5  # known to be useless, and still not forgotten for good


def test_the_ordinary_share_is_kept_in_every_task() -> None:
    known = miner(ordinary=0.25)
    tasks = ["x"] * 8 + ["y"] * 4
    mined = known.split(tasks)
    assert len([group for group in mined if group < 8]) == 6
    assert len([group for group in mined if group >= 8]) == 3
    assert mined != known.split(tasks)  # others the next time
    assert miner(ordinary=1.0).split(tasks) == []


def test_half_of_the_candidates_are_new() -> None:
    known = miner("abcdefghijkl", "x" * 12)
    known.observe(list("abcdef"), ["x"] * 6, np.array([0.0, 1.0] * 3 + [1.0, 1.0] * 3))
    for _ in range(20):
        rows = known.draw("x", 4, exclude={prompt_key("a"), prompt_key("l")})
        assert len(set(rows)) == 4
        assert sorted(row < 6 for row in rows) == [False, False, True, True]
        assert {1, 2} == {row for row in rows if row < 6}, "those known to be useless come last"
        assert not {0, 11} & set(rows)
    assert sorted(known.draw("x", 99, set())) == list(range(12))
    assert known.draw("z", 3, set()) == []


def test_a_restored_miner_goes_on_alike() -> None:
    first, second = miner(seed=3), miner(seed=3)
    first.observe(["a", "e"], ["x", "y"], np.array([0.0, 1.0, 1.0, 1.0]))
    first.draw("x", 2, set())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert vars(second) == vars(first)
    kept = first.state_dict()
    first.observe(["a", "b"], ["x", "x"], np.array([1.0, 1.0, 1.0, 1.0]))
    assert kept == second.state_dict()  # a state that is held does not move with the run
    assert second.draw("y", 3, set()) == first.draw("y", 3, set())
    assert second.split(["x"] * 9) == first.split(["x"] * 9)


# In the trainer. Half of the prompts can be passed, by a completion that begins with a lower-case letter.

LETTERS = "abcdefgh"
ROWS = [
    {"prompt": f"{task}: {a}{b}", "task": task, "target": b} for a in LETTERS for b in LETTERS for task in ("P", "A")
]


def right(completions: list[str], target: list[str], **_: Any) -> list[float]:
    return [float(wanted in "abcd" and text[:1].islower()) for text, wanted in zip(completions, target, strict=True)]


Trainers = Callable[..., RookWorldGRPOTrainer]


@pytest.fixture
def trainer_of(make_trainer: Trainers) -> Trainers:
    """A trainer on 64 prompts of each task, four of each a batch."""
    settings: dict[str, Any] = {"_reward": right, "rollout_backend": "native", "shuffle_dataset": False}
    settings |= {"per_device_train_batch_size": 32, "target_task": "A", "mining": True, "max_completion_length": 3}
    return lambda rows=ROWS, **changes: make_trainer(_data=Dataset.from_list(rows), **settings | changes)


def test_exact_pass_rates_are_the_models_own(trainer_of: Trainers) -> None:
    """By whole distributions over unpadded rows, at the task's temperature; what is too long cannot pass."""
    trainer = trainer_of(task_sampling={"A": {"temperature": 0.7}})
    contents = [trainer.train_dataset[row] for row in (1, 3, 5)]
    contents[2] = {**contents[2], "target": "abc"}  # with its end token, four tokens
    plugin_of(trainer, Mining).measure_pass_rates([1, 3, 5], contents)
    known = plugin_of(trainer, Mining).miner
    tokenizer = trainer.processing_class
    for row, content in zip((1, 3), contents, strict=False):
        prompt = tokenizer(content["prompt"])["input_ids"]
        truth = [*tokenizer(content["target"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = (trainer.model(torch.tensor([prompt + truth])).logits[0] / 0.7).log_softmax(-1)
        expected = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(truth))
        assert known.pass_rates[known.keys[row]] == pytest.approx(np.exp(expected), rel=1e-4)
    assert known.pass_rates[known.keys[5]] == 0


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_a_mined_batch(trainer_of: Trainers, backend: str) -> None:
    """Tasks stay where they were, ordinary prompts too; what the loss gets is what was sampled, past the gates."""
    trainer = trainer_of(rollout_backend=backend, mining_ordinary=0.25, mining_rounds=2)
    trainer.model.train()
    planned = next(iter(trainer.get_train_dataloader()))
    inputs = [dict(row) for row in planned]
    batch = trainer._generate_and_score_completions(inputs)
    assert [row["task"] for row in inputs] == [row["task"] for row in planned]
    groups = [inputs[first : first + 4] for first in range(0, 32, 4)]
    assert all(row == group[0] for group in groups for row in group)
    assert len({group[0]["prompt"] for group in groups}) == 8
    kept = [group[0] == planned[4 * number] for number, group in enumerate(groups)]
    assert sum(kept) >= 2
    assert not all(kept)
    texts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    assert texts == [row["prompt"] for row in inputs]
    metrics = trainer._metrics["train"]
    assert {
        "mining/ordinary_informative",
        "mining/resampled",
        "mining/pass_rate",
        "groups/informative",
    } <= metrics.keys()
    assert len(metrics["rewards/right/mean"]) == 1, "probing leaves no trace in TRL's logs"
    assert not trainer.gates.pending
    assert (batch.get("sampling_per_token_logps") is not None) == (backend == "native")


def test_a_prompt_gives_way_to_one_of_its_part(trainer_of: Trainers) -> None:
    """The shares of parts that the order of the data set fixes, such as strata, are those of the batch after mining."""
    rows = [{**row, "batch_part": "rare" if row["target"] == "h" else "common"} for row in ROWS]
    trainer = trainer_of(rows=rows, mining_ordinary=0.0, mining_rounds=2)
    trainer.model.train()
    for planned in itertools.islice(trainer.get_train_dataloader(), 4):
        inputs = [dict(row) for row in planned]
        trainer._generate_and_score_completions(inputs)
        for column in ("task", "batch_part"):
            assert [row[column] for row in inputs] == [row[column] for row in planned]
        assert [row["prompt"] for row in inputs] != [row["prompt"] for row in planned]


def test_only_zero_variance_groups_are_sampled_again(trainer_of: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards by call: first all groups agree but the third and an ordinary one, then all differ."""
    trainer = trainer_of(mining_rounds=3)
    monkeypatch.setattr(mining, "CANDIDATES", 1)  # at first, the prompts as planned
    trainer.model.train()
    monkeypatch.setattr(plugin_of(trainer, Mining).miner, "split", lambda tasks: [0, 1, 2, 3, 4, 5])
    differing = {2, 7}
    sampled: list[int] = []
    sample = sampler.rollout

    def counting(model: Any, prompt_ids: Any, **settings: Any) -> Any:
        sampled.append(len(prompt_ids))
        return sample(model, prompt_ids, **settings)

    def rewards(completions: list[str], **_: Any) -> list[float]:
        values = [float(row % 4 == 0 and row // 4 in differing) for row in range(len(completions))]
        differing.update(range(8))
        return values

    rewards.__name__ = "right"
    monkeypatch.setattr(sampler, "rollout", counting)
    trainer.reward_funcs = [rewards]
    planned = next(iter(trainer.get_train_dataloader()))
    inputs = [dict(row) for row in planned]
    trainer._generate_and_score_completions(inputs)
    assert sampled == [32, 20]  # then groups 0, 1, 3, 4 and 5 again; 6 agreed too, but is ordinary
    changed = [inputs[4 * group]["prompt"] != planned[4 * group]["prompt"] for group in range(8)]
    assert changed == [True, True, False, True, True, True, False, False]
    assert trainer._metrics["train"]["mining/resampled"] == [5 / 8]
    assert trainer._metrics["train"]["mining/ordinary_informative"] == [
        1.0
    ]  # groups 6 and 7, when they were rewarded last
    assert trainer._metrics["train"]["groups/informative"] == [1.0]


def test_mining_raises_the_informative_share_by_half(trainer_of: Trainers) -> None:
    shares = {}
    for mined in (False, True):
        trainer = trainer_of(mining=mined, mining_rounds=3, max_steps=6, learning_rate=0.0, seed=5)
        trainer.train()
        shares[mined] = [row["groups/informative"] for row in trainer.state.log_history if "loss" in row]
    plain, with_mining = (sum(shares[mined]) / 6 for mined in (False, True))
    assert 0.1 < plain < 0.6
    assert with_mining >= 1.5 * plain
