"""The evidence at another size: a tiny GPT-2 with GPT-2's tokenizer in place of the 124M one, a CPU in the GPU's."""

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import shipped
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import arms, rivals, store
from benchmarks.evidence import budget as budgets
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.sizes import NANO, SIZES, Size
from benchmarks.fresh import write_fresh
from benchmarks.gpu.stage import TINY
from rookworld_trl.chess import prompts
from rookworld_trl.chess.dataset import draw_of_each
from rookworld_trl.modeling.loading import load
from tests.benchmarks.test_evidence import asked

BIG = SIZES["124m"]


class Mixed(Size):
    """bf16 on a CPU, as a GPU has it."""

    bf16 = True  # type: ignore[assignment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "tiny"
    write_fresh(folder, **TINY)
    return folder


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred rows in place of those of training, a dozen of those held out, six in place of the loops' batches."""
    train, held_out = (
        draw_of_each(shipped(split), {"policy": 3 * count, "environment": count})
        for split, count in (("train", 27), ("dev", 3))
    )
    for module, name in ((arms, "shipped"), (prompts, "load_shipped")):
        monkeypatch.setattr(module, name, lambda split: train if split == "train" else held_out)
    rows = list(draw_of_each(train, {"policy": 3, "environment": 3}))
    monkeypatch.setattr(rivals, "batches", lambda number, seed: iter([rows] * 9))


def lengths(completions: list[str], **columns: Any) -> list[float | None]:
    """Rewards that differ, which those of a random model do not."""
    return [float(len(text)) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains_with_gpt2s_tokens(
    name: str, folder: Path, few_rows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates in four pieces under bf16: 16 prompts of two samples each, or the loops' few rows."""
    small: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
    # Of what random weights write for `P:` nothing can be decided, which the exact gradient refuses.
    small |= {"mix_env_ratio": 1.0} if name in ("exact", "mixed") else {}
    read_recipe = arms.read_recipe
    monkeypatch.setattr(arms, "read_recipe", lambda recipe, size, keys: read_recipe(recipe, size, {**keys, **small}))
    monkeypatch.setattr(arms, "STEPS_OF_PROMPTS", 2)
    monkeypatch.setitem(arms.REWARDS, "continuous", [lengths])
    monkeypatch.setattr(rivals, "REWARDS", [lengths])
    mixed: dict[str, set[bool]] = {"forward": set(), "rollout": set()}

    def watched(what: str, original: Any, *args: Any, **options: Any) -> Any:
        mixed[what].add(torch.is_autocast_enabled("cpu"))
        return original(*args, **options)

    for what, function in (("forward", "likelihood"), ("forward", "score_tree"), ("rollout", "rollout")):
        monkeypatch.setattr(rivals, function, partial(watched, what, getattr(rivals, function)))
    settings = {each.name: getattr(BIG, each.name) for each in fields(BIG)}
    size, budget = Mixed(**settings | {"folder": folder, "tokens": 8, "device": "cpu"}), Budget(1.0, updates=2)
    model = ARMS[name].train(size, tmp_path, budget, 1)
    assert (len(budget.curve), budget.samples) == (2, {"gold": 12, "soft": 12, "raft": 12 * 16}.get(name, 64))
    if name in ("gold", "soft", "raft"):
        assert mixed == {"forward": {True}, "rollout": {True} if name == "raft" else set()}
    before, after = load(folder)[0].state_dict(), model.state_dict()
    moved = [(after[key] - weight).abs().max().item() for key, weight in before.items()]
    assert 0 < max(moved) < 1e-4  # Adam's steps are about one rate each, and these a fifth and a half of it
    assert {weight.dtype for weight in after.values()} == {torch.float32}


@pytest.mark.parametrize(
    "loop", [partial(rivals.gold, rows=6), partial(rivals.soft, rows=6, temperature=0.1)], ids=["gold", "soft"]
)
def test_pieces_add_up_to_the_whole(loop: Any, folder: Path, few_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda weights, most: seen.append([w.grad.clone() for w in weights])
    )
    for pieces in (1, 4):
        model, tokenizer = load(folder)
        loop(model, tokenizer, replace(NANO, pieces=pieces), Budget(1.0, updates=1), 0)
    for one, four in zip(*seen, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-3, atol=1e-5)


def test_on_a_gpu_a_budget_counts_the_clock_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step queues four seconds of work, of which the clock knows only after waiting."""
    now, queued = [50.0], [0.0]

    def wait(device: str) -> None:
        assert device == "cuda"
        now[0], queued[0] = now[0] + queued[0], 0.0

    monkeypatch.setattr(budgets, "wait", wait)
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(budgets, "cpu_seconds", lambda: pytest.fail("CPU time says nothing of a GPU"))
    budget = Budget(10.0, device="cuda")
    ends = []
    for _ in range(3):
        assert budget.factor >= 0
        queued[0] = 4.0
        ends.append(budget.step(8))
    assert ends == [False, False, True]
    assert budget.curve == [(4.0, 8), (8.0, 16), (12.0, 24)]


@pytest.mark.slow
def test_another_size_has_files_and_a_table_of_its_own(
    folder: Path, few_rows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "MODELS", tmp_path / "models")
    monkeypatch.setitem(SIZES, "124m", replace(BIG, folder=folder, tokens=8))
    settings: dict[str, Any] = {"size": "124m", "device": "cpu"}
    evidence.run(asked(arms=["gold"], updates=1, **settings))
    own = [f"124m-cpu/{run}" for run in ("argmax_evals-0min-seed0", "base-0min-seed0", "gold-1min-seed3")]
    assert store.names("dev", "124m-cpu") == own
    found = store.read("dev", own[-1])
    facts = found.facts
    assert (facts["learning_rate"], facts["samples"]) == (1e-5 * ARMS["gold"].factor, 6)
    assert load(tmp_path / "models" / "124m-cpu-gold-1min-seed3")[0].config.n_embd == TINY["n_embd"]
    others = {task: keys[::-1] for task, keys in found.keys.items()}
    store.save("dev", "other/gold-1min-seed1", replace(found, keys=others))
    capsys.readouterr()
    evidence.table(asked(**settings))
    assert "| gold | 1 |" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "124m-cpu-dev-1min.json").read_text())["updates"]) == {
        "base",
        "argmax_evals",
        "gold",
    }
    for other in (asked(), asked(size="124m")):
        with pytest.raises(SystemExit, match="holds no runs"):
            evidence.table(other)


MISSING: list[tuple[dict[str, str], str]] = [
    ({}, "PyTorch sees no GPU, which this comparison is made for; --device cpu goes without, slowly"),
    ({"device": "cpu"}, "/big holds no checkpoint; run `make gpu` first, or give another folder by"),
    ({"device": "cpu", "start": "/nowhere"}, "/nowhere holds no checkpoint; give another folder by --start"),
]


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(SIZES, "124m", replace(BIG, folder=tmp_path / "big"))
    for settings, message in MISSING:
        with pytest.raises(SystemExit) as end:
            evidence.run(asked(size="124m", **settings))
        assert message in str(end.value)
        assert "\n" not in str(end.value)
