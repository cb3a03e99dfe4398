"""Operations of GPT-2 against a count made by others, and against a counter that watches the matrix products."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from rookworld_trl.memory import Memory, memory_gb
from rookworld_trl.plugins.throughput import (
    Throughput,
    forward_flops,
    peak_flops,
    sampling_flops,
    scoring_flops,
    shared_scoring_flops,
)

# nanoGPT's transformer_sizing.ipynb: forward pass of GPT-2 small over 1024 tokens, attention counted in full.
NANOGPT_FORWARD = 291_648_307_200


def test_gpt2_small_by_hand() -> None:
    config = GPT2Config()
    full_attention = 12 * 4 * 768 * 1024 * 1024
    causal = 12 * 4 * 768 * (1024 * 1025 // 2)
    assert forward_flops(config, 0, 1024, 1024) == NANOGPT_FORWARD - full_attention + causal


def test_never_more_than_the_model_really_does() -> None:
    """PyTorch's own counter over a forward pass sees full attention and every logit; ours counts less, and not half."""
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, n_positions=64, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(3, 40, dtype=torch.long))
    ours = scoring_flops(config, [25] * 3, [15] * 3)
    assert 0.5 * counter.get_total_flops() < ours <= counter.get_total_flops()
    dense = 3 * (forward_flops(config, 0, 40, 40) + 2 * 4 * 64 * (40 * 40 - 40 * 41 // 2))
    assert dense == counter.get_total_flops()


def test_a_groups_prompt_is_counted_once() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    rows = sampling_flops(config, [5, 5, 7, 7], [3, 2, 4, 1], 2)
    expected = sum(forward_flops(config, p, p + c - 1, c) for p, c in ((5, 3), (5, 2), (7, 4), (7, 1)))
    assert rows == expected + forward_flops(config, 0, 5, 0) + forward_flops(config, 0, 7, 0)


def test_shared_prefixes_are_counted_once_by_hand() -> None:
    """Prompt 1 2 with completions 3 4, 3 5 and 3, and a row 7 8: what is new is 1 2 3 4, the 5, and 7 8."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    ids = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [0, 7, 8, 0], [1, 2, 3, 0]])
    expected = forward_flops(config, 0, 4, 2) + forward_flops(config, 3, 4, 1) + forward_flops(config, 0, 2, 1)
    assert shared_scoring_flops(config, ids, ids > 0, np.array([2, 2, 1, 1])) == expected
    distinct = np.array([[0, 1, 2, 3, 4], [2, 2, 2, 5, 0]])
    assert shared_scoring_flops(config, distinct, distinct > 0, np.array([2, 1])) == scoring_flops(
        config, [2, 3], [2, 1]
    )


def test_shared_prefixes_against_a_set_of_prefixes() -> None:
    """Every distinct prefix is one position that is computed, whatever the order of the rows."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 8, 50)
    mask = np.arange(8) < lengths[:, None]
    ids = generator.integers(1, 3, (50, 8)) * mask
    prefixes = {tuple(row[: n + 1]) for row, length in zip(ids, lengths, strict=True) for n in range(length)}
    expected = sum(forward_flops(config, len(prefix) - 1, len(prefix), 0) for prefix in prefixes)
    assert shared_scoring_flops(config, ids, mask, np.zeros(50, dtype=int)) == expected


ARGS: Any = SimpleNamespace(use_cpu=True, torch_compile=False)


def metered(config: GPT2Config, generations: int = 1, drafted: list[bool] | None = None) -> tuple[Throughput, Any]:
    """A plug-in in its first step, with a peak of 1,000 TFLOP a second, and what it records."""
    recorded: dict[str, float] = {}
    sampler = SimpleNamespace(rows=lambda rows: nullcontext(), drafted=lambda: drafted)
    meter = Throughput(peak_tflops=1000.0)
    meter.attach(
        SimpleNamespace(
            model=SimpleNamespace(config=config),
            scorer=SimpleNamespace(shared=False),
            args=ARGS,
            accelerator=SimpleNamespace(mixed_precision="no"),
            num_generations=generations,
            sampler=sampler,
            record=recorded.__setitem__,
        )
    )
    meter.on_step_begin(ARGS, None, None)
    return meter, recorded


def test_a_step_is_reported_as_a_share_of_the_peak() -> None:
    """Two rows of 5 + 3 tokens; 2 s of sampling in two parts and 1 s of rewards, the rest is learning."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    meter, recorded = metered(config, generations=2)
    batch = {"prompt_mask": torch.ones(2, 5), "completion_mask": torch.ones(2, 3)}
    meter.sampled([], batch)
    meter.trained(batch)
    assert meter.flops == sampling_flops(config, [5, 5], [3, 3], 2) + 3 * scoring_flops(config, [5, 5], [3, 3])
    for phase, seconds in (("sampling", 1.5), ("sampling", 0.5), ("rewards", 1.0)):
        meter.ended(phase, seconds)
    meter.started -= 10.0
    meter.on_step_end(ARGS, None, None)
    assert 0 < recorded["perf/mfu"] < 1
    assert recorded["perf/mfu"] == pytest.approx(recorded["perf/tflops_per_second"] / 1000)
    assert recorded["perf/memory_gb"] > 0
    assert (recorded["perf/seconds_sampling"], recorded["perf/seconds_rewards"]) == (2.0, 1.0)
    assert recorded["perf/seconds_learning"] == pytest.approx(7.0, abs=0.5)
    meter.on_step_begin(ARGS, None, None)
    assert (meter.flops, meter.seconds) == (0, {})


def test_drafted_rows_count_what_they_share_once() -> None:
    """Rows 1 2 | 3 4 9 and 1 2 | 3 5 9 are drafted: 1 2 3 4 and the 5 are passed; the third row is sampled plainly."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    meter, _ = metered(config, drafted=[True, True, False])
    batch = {
        "prompt_ids": torch.tensor([[1, 2], [1, 2], [0, 7]]),
        "prompt_mask": torch.tensor([[1, 1], [1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[3, 4, 9], [3, 5, 9], [8, 9, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]),
    }
    meter.sampled([], batch)
    drafted = forward_flops(config, 0, 4, 2) + forward_flops(config, 3, 4, 1)
    assert meter.flops == drafted + sampling_flops(config, [1], [2], 1)


def test_a_run_reports_its_throughput(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(throughput=True, peak_tflops=1000.0)
    trainer.train()
    log = trainer.state.log_history[1]
    assert 0 < log["perf/mfu"] < 1
    assert min(log[f"perf/seconds_{name}"] for name in ("sampling", "rewards", "learning")) > 0


def test_peaks() -> None:
    known = {
        "NVIDIA H200": (67e12, 989e12),
        "NVIDIA H100 80GB HBM3": (67e12, 989e12),
        "NVIDIA H100 PCIe": (51e12, 756e12),
        "NVIDIA A100-SXM4-80GB": (19.5e12, 312e12),
        "NVIDIA A100 80GB PCIe": (19.5e12, 312e12),
        "NVIDIA GeForce RTX 4090": (82.6e12, 165.2e12),
    }
    for name, peaks in known.items():
        assert (peak_flops(name, mixed=False), peak_flops(name, mixed=True)) == peaks
    laptops_and_others = ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 NVL"]
    for name in (*laptops_and_others, "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "something else"):
        assert peak_flops(name, mixed=True) is None


class Card:
    """A GPU's allocator: what is in use, and the most since it was last asked to forget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0.0
        for name, value in {
            "is_available": lambda: True,
            "memory_allocated": lambda: self.now * 1e9,
            "memory_reserved": lambda: 2 * self.now * 1e9,
            "max_memory_allocated": lambda: self.peak * 1e9,
            "reset_peak_memory_stats": self.forget,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def forget(self) -> None:
        self.peak = self.now

    def use(self, *gb: float) -> None:
        for self.now in gb:
            self.peak = max(self.peak, self.now)


def test_peaks_belong_to_their_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    card, memory = Card(monkeypatch), Memory()
    card.use(9, 1)  # an evaluation before training
    memory.begin()
    for rollout in ((3, 1), (4, 1), (2, 1)):  # mining draws several times
        card.use(*rollout)
        memory.ended("rollout")
    card.use(2.5, 1.5)
    memory.ended("scoring")
    card.use(6, 1.25)
    assert memory.step() == {
        "gb": 9,
        "allocated_gb": 1.25,
        "reserved_gb": 2.5,
        "rollout_gb": 4,
        "scoring_gb": 2.5,
        "learn_gb": 6,
    }
    card.use(10, 1)  # an evaluation, which samples
    memory.ended("rollout")
    memory.begin()
    card.use(5, 1)
    assert memory.step() == {"gb": 10, "allocated_gb": 1, "reserved_gb": 2, "learn_gb": 5}


def test_memory_of_a_run_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    assert memory_gb() > 0.1
    figures = Memory().step()
    assert figures.keys() == {"gb", "rss_gb"}
    assert all(0.1 < value < 50 for value in figures.values())
    card.use(5)
    assert memory_gb() == 5
