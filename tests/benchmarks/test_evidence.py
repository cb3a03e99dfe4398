"""The evidence: statistics by hand, equal budgets, rivals that learn from what they should, results that come back."""

import argparse
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.common import shipped
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import arms, rivals, store
from benchmarks.evidence import budget as budgets
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.sizes import NANO, SIZES
from rookworld_trl.chess.accuracy import baseline_scores, item_key, score
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.modeling.loading import NANO_FOLDER, load
from tests.support.tables.evidence import headlines


def asked(**settings: Any) -> argparse.Namespace:
    """Arguments of the program, those of its defaults that a test does not name."""
    known: dict[str, Any] = {"what": "table", "arms": [], "minutes": [1.0], "seeds": [3], "split": "dev"}
    known |= {"size": "nano", "device": None, "start": None, "start_name": None, "updates": None, "factors": [None]}
    known |= {"ours": "exact", "groups": False, "name": None}
    return argparse.Namespace(**known | {"policy_items": 12, "environment_items": 6} | settings)


def test_a_budget_counts_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(budgets.os, "times", lambda: (now[0] / 2, 3.0, now[0] / 2, 4.0, 1e6))  # half of it engines
    budget = Budget(10.0)
    assert budget.factor == pytest.approx(0.2)  # of the first step
    now[0] = 100.3
    assert budget.factor == pytest.approx(0.8)
    now[0] = 105.0
    assert budget.factor == pytest.approx(0.5 / 0.95)
    assert not budget.step(8)
    now[0] = 111.0
    assert budget.step(8)
    assert budget.factor == 0.0
    assert budget.curve == [(5.0, 8), (11.0, 16)]


def test_a_budget_of_updates_does_not_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(budgets, "cpu_seconds", lambda: now[0])
    budget = Budget(10.0, updates=4)
    factors = []
    for _ in range(3):
        factors.append(budget.factor)
        now[0] += 100.0
        assert not budget.step(8)
    assert factors == pytest.approx([0.2, 0.75 / 0.95, 0.5 / 0.95])
    assert budget.step(8)
    assert budget.factor == 0.0
    assert budget.curve[-1] == (300.0, 32)  # the clock starts with the first step's rate


def test_soft_labels_are_the_distribution_of_rewards() -> None:
    tokenizer = load("nano")[1]
    row = next(row for row in load_shipped("dev") if row["task"] == "policy" and len(row["legal_moves"]) > 5)
    answer = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    find = rivals.SoftPoints(tokenizer, 0.1)
    hard, soft = find.find(row, answer), find(row, answer)
    assert not soft["decisions"]
    # What must not stand anywhere, as a further digit of an eval, is no label.
    taken = [each for each in hard["decisions"] if "otherwise" not in each]
    assert len(taken) < len(hard["decisions"])
    assert len(soft["determined"]) == len(hard["determined"]) + sum(len(each["actions"]) for each in taken)
    last = hard["decisions"][-1]
    of_best = [each for each in soft["determined"] if each["position"] == last["position"]]
    weights = np.array([each["weight"] for each in of_best])
    expected = np.exp(np.array(last["rewards"]) / 0.1)
    assert np.allclose(weights, last["weight"] * expected / expected.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop", [partial(rivals.gold, rows=16), partial(rivals.soft, rows=16, temperature=0.1)], ids=["gold", "soft"]
)
def test_rivals_learn(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right answers of the rows that were learned from become likelier."""
    model, tokenizer = load("nano")
    monkeypatch.setattr(rivals, "BATCHES", 1)
    rows = next(rivals.batches(16, seed=0))
    monkeypatch.setattr(rivals, "batches", lambda prompts, seed: iter([rows] * 99))
    batch = rivals.encode(tokenizer, rows)

    def nats() -> float:
        return float(rivals.likelihood(model, tokenizer.pad_token_id, *batch).detach())

    before, budget = nats(), Budget(1.0, updates=3)
    loop(model, tokenizer, replace(NANO, learning_rate=1e-4), budget, 0)
    assert len(budget.curve) == 3
    assert budget.samples == 3 * 16
    assert nats() < before


def test_raft_learns_from_the_best_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three prompts with two samples each: the second sample, the first, and none, since both earn the same."""
    model, tokenizer = load("nano")
    monkeypatch.setattr(rivals, "BATCHES", 1)
    rows = next(rivals.batches(16, seed=0))[:3]
    monkeypatch.setattr(rivals, "batches", lambda prompts, seed: iter([rows]))
    end = tokenizer.eos_token_id
    sampled = [[10, end], [11, 12, end], [13, 14, 15, end], [16, end], [17, end], [18, end]]
    monkeypatch.setattr(rivals, "rollout", lambda *args, **options: SimpleNamespace(completion_ids=sampled))
    lengths = [1.0, 2.0, 3.0, 1.0, 1.0, 1.0]
    monkeypatch.setattr(rivals, "REWARDS", [lambda **columns: lengths, lambda **columns: [None] * 6])
    learned = []

    def likelihood(model: Any, pad: int, prompts: list[list[int]], completions: list[list[int]]) -> Any:
        learned.append((prompts, completions))
        return rivals.torch.zeros((), requires_grad=True)

    monkeypatch.setattr(rivals, "likelihood", likelihood)
    rivals.raft(model, tokenizer, NANO, Budget(1.0, updates=1), 0, rows=3, samples=2, temperature=1.0)
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    assert learned == [(prompts[:2], [sampled[1], sampled[2]])]


def test_batches_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "BATCHES", 2)
    batches = rivals.batches(16, seed=0)
    first, second, again = (next(batches) for _ in range(3))
    assert first == again != second


def test_best_eval_takes_the_place_of_b() -> None:
    row = next(row for row in load_shipped("dev") if row["task"] == "policy" and len(row["legal_moves"]) > 5)
    a, b = row["legal_moves"][:2]
    text = f" M: {a} {b} E: 0.1 0.3 B: {a}"
    evaluation = score([row, row], [text, " M: junk"])
    changed = evidence.with_best_evals(evaluation, [row, row])
    assert [item.completion for item in changed[0].items] == [f" M: {a} {b} E: 0.1 0.3 B: {b}", " M: junk"]


@pytest.mark.slow
def test_results_come_back_and_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two arms and the base, trained for two steps each, measured on a few dev items; what is there isn't run again."""
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "MODELS", tmp_path / "models")
    monkeypatch.setattr(evidence, "Budget", lambda seconds, updates, device: Budget(1.0, updates=1))
    monkeypatch.setattr(rivals, "BATCHES", 1)
    monkeypatch.setattr(arms, "STEPS_OF_PROMPTS", 1)
    arguments = asked(arms=["gold", "exact"], start=str(NANO_FOLDER))
    evidence.run(arguments)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"gold-1min-seed3", "exact-1min-seed3"}
    model, _ = load(tmp_path / "models" / "exact-1min-seed3")
    assert not model.training
    assert [path.name for path in tmp_path.glob("*.*")] == ["dev.parquet"]
    own = ["argmax_evals-0min-seed0", "base-0min-seed0", "exact-1min-seed3", "gold-1min-seed3"]
    assert store.names("dev") == own
    found = store.read("dev", store.name_of("exact", 1.0, 3))
    assert found.facts["steps"] == 1
    assert found.facts["samples"] == 96
    assert found.terms["policy", "greedy"][0].shape == (12, len(store.metrics_of("policy")))
    capsys.readouterr()
    evidence.run(arguments)
    assert capsys.readouterr().out == ""
    evidence.run(asked(arms=["gold"], start=str(NANO_FOLDER), factors=[0.5]))
    trial = store.read("dev", "gold_rate_0.5-1min-seed3").facts
    assert (trial["arm"], trial["learning_rate"]) == ("gold_rate_0.5", 1e-4)
    capsys.readouterr()
    evidence.table(arguments)
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("base", "argmax_evals", "gold", "exact", "random legal", "input copied"))
    report = (tmp_path / "dev-1min.json").read_text()
    assert '"p_holm"' in report
    assert '"against": "base"' in report


def policy_keys() -> list[str]:
    """Of 200 `P:` items of dev."""
    return [item_key(row) for row in itertools.islice((r for r in shipped("dev") if r["task"] == "policy"), 200)]


def made_up(arms: dict[str, tuple[float, float]]) -> None:
    """Two runs of each arm, alike, that play so many of 200 `P:` items legally, and have so much skill when sampled."""
    names = [metric.name for metric in store.metrics_of("policy")]
    ones, keys = np.ones((200, len(names))), policy_keys()
    for (arm, (legal, skill)), seed in itertools.product(arms.items(), (1, 2)):
        found = {}
        for mode in ("greedy", "sampled"):
            top = np.full((200, len(names)), 0.5)
            top[:, names.index("best_legal")] = np.arange(200) < 200 * legal
            top[:, names.index("skill")] = 0.5 if mode == "greedy" else np.arange(200) < 200 * skill
            found["policy", mode] = (top, ones)
        facts = {"arm": arm, "minutes": 0.0 if arm == "base" else 1.0, "seed": seed, "steps": 7, "samples": 0}
        result = store.Result(facts, {"policy": keys}, {"policy": [""] * 200}, found)
        store.save("dev", store.name_of(arm, facts["minutes"], seed), result)


def test_a_table_shows_what_got_worse_and_what_counts_as_a_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made-up results: an arm that plays more legally (+30 points of 200 items), with less skill, sampled alone."""
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "SHOWN", "dev-1min")
    monkeypatch.setattr(evidence, "FIGURE", tmp_path / "figure.svg")
    made_up({"base": (0.5, 0.5), "gold": (0.8, 0.2), "exact": (0.6, 0.5)})
    evidence.table(asked(arms=None, groups=True))
    assert "legality" in (drawn := (tmp_path / "figure.svg").read_text())
    assert "skill" in drawn
    arms, ours, changes = capsys.readouterr().out.strip().split("\n\n")
    lines = arms.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == ["base", "exact", "gold"]
    assert lines[4].startswith("| gold | 2 | 7 | **0.800** [")
    assert lines[4].count("*") == 4
    assert lines[5] == "| (random legal) | | | 1.000 | 0.000 | |"
    _, _, exact, gold = changes.splitlines()
    # The paired differences are 60 ones and 140 zeros, of which the deviation is sqrt(0.3 x 0.7 x 200 / 199).
    assert "| best_legal +0.300 [+0.236, +0.364]; best_legal, sampled +0.300" in gold
    assert gold.rpartition("| skill")[2].startswith(", sampled -0.300 [-0.364, -0.236] |")
    assert exact.endswith("| none |")
    assert ours.splitlines()[0].startswith("| exact less | legality | skill |")
    assert [line.split(" ")[1] for line in ours.splitlines()[2:]] == ["base", "gold"]
    assert "| gold | **-0.200** [" in ours
    rows = [row for row in shipped("dev") if row["task"] == "policy"][:200]
    first = [baseline_scores(row) for row in rows]  # the base moves legally in the first 100, gold in 160

    def material(count: int) -> float:
        won = sum(s["material.best_value"] - s["random.best_value"] for s in first[:count])
        return won / sum(1 - s["random.best_value"] for s in first[:count])

    ends = [line.rpartition("] | ")[2] for line in (lines[2], lines[4])]
    assert ends == [f"{material(100):.3f} |", f"{material(160):.3f} |"]
    assert lines[7] == f"| (most material) | | | 1.000 | {material(100):.3f} | |"
    written = json.loads((tmp_path / "dev-1min.json").read_text())
    white = sum(" w " in row["prompt"] for row in rows)
    found = [row for row in written["groups"] if (row["group"], row["arm"]) == ("White to move", "gold")]
    assert {row["items"] for row in found} == {white}


def test_rates_are_those_that_the_trials_chose() -> None:
    """As RULE.md says: of three trials on dev that whose headlines sum to most, for each arm measured on test."""
    measured = {store.read("test", name).facts["arm"] for name in store.names("test")} & set(ARMS)
    assert len(measured) >= 6
    for name in measured:
        runs = {factor: store.read("dev", f"{name}_rate_{factor:g}-3min-seed1") for factor in (0.5, 1, 2)}
        assert ARMS[name].factor == max(runs, key=lambda factor: sum(headlines(runs[factor]))), name


class BuiltError(Exception):
    pass


SETTINGS = {  # the objective, and what advantages are divided by
    "exact": ("exact", "group"),
    "mixed": ("mixed", "group"),
    "sampled": ("sampled", "group"),
    "sampled_unscaled": ("sampled", "none"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_can_be_laid_out(name: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are accepted, and its share of checks is a whole number of prompts in every batch, of which a pass
    holds a piece."""
    train: Any = ARMS[name].train
    if train.func is arms.of_loop:
        monkeypatch.setattr(rivals, "BATCHES", 1)
        (loop,) = train.args
        rows = next(rivals.batches(loop.keywords["rows"], 1))
        assert len(rows) == loop.keywords["rows"]
        return

    def built(run: Any, args: Any, *_: Any) -> None:
        prompts = args.generation_batch_size // args.num_generations
        assert prompts == (48 if name in ("exact", "mixed") else 64)
        assert (run.mix_env_ratio, run.policy_strata) == (rivals.ENVIRONMENT, {"check": rivals.CHECK}), "as the loops"
        assert (prompts * run.mix_env_ratio).is_integer()
        for share in (run.policy_strata or {}).values():
            assert prompts * (1 - run.mix_env_ratio) * share == pytest.approx(prompts / 8, abs=0.01)
        pieces, tokens, rate = (1, 80, 2e-4) if size == "nano" else (4, 144, 1e-5)
        assert args.per_device_train_batch_size == (32 if name in ("exact", "mixed") else 128) // pieces
        assert (args.objective, args.scale_rewards) == SETTINGS[name]
        assert (args.max_completion_length, args.learning_rate, args.use_cpu) == (tokens, rate, True)
        raise BuiltError

    monkeypatch.setattr(arms.grpo, "build", built)
    if train.func is arms.of_recipe:
        with pytest.raises(BuiltError):
            train(replace(SIZES[size], device="cpu"), tmp_path, Budget(1.0, updates=1), 1)
