"""Exact ratio in every batch, whole passes before repeats, and TRL's own sampler reading the order as meant."""

from collections import Counter

import pytest
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from rookworld_trl.chess.mixing import mix, prompts_of


def rows(policy: int, environment: int) -> Dataset:
    tasks = ["policy"] * policy + ["environment"] * environment
    return Dataset.from_dict({"id": list(range(len(tasks))), "task": tasks})


def batches_of(dataset: Dataset, size: int, column: str) -> list[list]:
    values = list(dataset[column])
    return [values[i : i + size] for i in range(0, len(values), size)]


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [(0.2, 10, 2), (0.25, 64, 16), (0.0, 7, 0), (1.0, 7, 7), (0.1, 30, 3), (0.1667, 36, 6), (0.33333, 48, 16)],
)
def test_a_possible_ratio_gives_whole_prompts(ratio, size, expected):
    """A rounded one too."""
    assert prompts_of(ratio, size, "mix_env_ratio") == expected


@pytest.mark.parametrize(
    ("ratio", "size", "message"),
    [
        (0.2, 64, r"`x` is 0.2: 12.8 of 64 .* 0.1875 \(12 prompts\) or 0.203125 \(13\)"),
        (0.17, 36, r"`x` is 0.17: 6.12 of 36 prompts"),
        (-0.1, 10, "Write a number from 0 to 1"),
        (1.5, 10, "Write a number from 0 to 1"),
    ],
)
def test_an_impossible_ratio_is_refused_with_the_nearest_possible_ones(ratio, size, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(ratio, size, "x")


def test_every_batch_holds_exactly_the_ratio_through_the_sampler_of_trl():
    mixed = mix(rows(23, 11), mix_env_ratio=0.2, prompts_per_batch=10, batches=50, seed=0)
    # What GRPOTrainer builds: 10 prompts a generation batch, 4 completions each, 2 optimizer steps a generation.
    sampler = RepeatSampler(mixed, mini_repeat_count=4, batch_size=10, repeat_count=2, shuffle=False)
    order = list(sampler)
    assert len(order) == 50 * 10 * 4 * 2  # nothing is dropped
    tasks = mixed["task"]
    for start in range(0, len(order), 40):
        assert Counter(tasks[i] for i in order[start : start + 40]) == {"policy": 32, "environment": 8}


def test_over_uneven_passes_rows_are_used_equally_and_never_twice_in_a_batch():
    mixed = mix(rows(7, 5), mix_env_ratio=0.4, prompts_per_batch=5, batches=70, seed=3)
    assert all(len(set(batch)) == 5 for batch in batches_of(mixed, 5, "id"))
    uses = Counter(mixed["id"])
    assert {uses[i] for i in range(7)} == {30}  # 70 batches x 3 over 7 rows
    assert {uses[i] for i in range(7, 12)} == {28}  # 70 x 2 over 5 rows


def test_the_ratio_does_not_change_a_tasks_order():
    few, again, other = (mix(rows(40, 40), 0.2, prompts_per_batch=5, batches=10, seed=s)["id"][:] for s in (0, 0, 1))
    assert few == again != other
    many = mix(rows(40, 40), mix_env_ratio=0.6, prompts_per_batch=5, batches=10, seed=0)["id"][:]
    kept = [i for i in few if i >= 40]
    assert kept == [i for i in many if i >= 40][: len(kept)]


def test_a_task_with_too_few_rows_is_refused():
    with pytest.raises(ValueError, match="has 1 rows of task 'environment', a batch takes 2"):
        mix(rows(50, 1), mix_env_ratio=0.2, prompts_per_batch=10, batches=1, seed=0)


IN_CHECK = "P: 4k3/8/8/8/8/8/4r3/4K3 w - - 0 1"
QUIET = "P: 4k3/8/8/8/8/8/3r4/4K3 w - - 0 1"


def with_strata() -> Dataset:
    """30 `P:` rows, of which 4 are in check, 6 have no stratum and 20 are endgames; 10 `A:` rows."""
    dataset = rows(30, 10).add_column("prompt", [IN_CHECK] * 4 + [QUIET] * 26 + ["A: whatever"] * 10)
    return dataset.add_column("stratum", ["endgame"] * 4 + [None] * 6 + ["endgame"] * 20 + ["quiet"] * 10)


def test_every_batch_holds_exactly_the_share_of_a_stratum():
    dataset = with_strata()
    plain = mix(dataset, 0.2, prompts_per_batch=10, batches=12, seed=3)
    strata = {"check": 0.25, "endgame": 0.5}
    mixed = mix(dataset, 0.2, prompts_per_batch=10, batches=12, seed=3, policy_strata=strata)
    for batch in batches_of(mixed, 10, "id"):
        assert sum(row >= 30 for row in batch) == 2
        assert sum(row < 4 for row in batch) == 2  # a quarter of eight
        assert sum(10 <= row < 30 for row in batch) == 4  # those in check don't count as endgames
        assert len(set(batch)) == 10
    parts = {
        row: "check" if row < 4 else "policy" if row < 10 else "endgame" if row < 30 else "environment"
        for row in range(40)
    }
    assert mixed["batch_part"] == [parts[row] for row in mixed["id"]]
    assert {row for row in mixed["id"] if row < 30} == set(range(30))  # rows without a stratum take part
    assert [row for row in mixed["id"] if row >= 30] == [row for row in plain["id"] if row >= 30]


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        ({"check": 0.3}, r"`policy_strata: check` is 0.3: 2.4 of 8 prompts"),
        ({"check": 0.5, "endgame": 0.75}, "shares exceed 1"),
        ({"chekc": 0.25}, "0 rows of stratum 'chekc', a batch takes 2"),
    ],
)
def test_impossible_strata_are_refused(strata, message):
    with pytest.raises(ValueError, match=message):
        mix(with_strata(), 0.2, prompts_per_batch=10, batches=2, seed=0, policy_strata=strata)
