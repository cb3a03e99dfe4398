"""Micro-batches are chosen by memory, on all processes alike."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rookworld_trl.plugins import micro_batch
from rookworld_trl.plugins.micro_batch import MicroBatch
from rookworld_trl.training import RookWorldGRPOConfig
from rookworld_trl.training.plugin import check_plugins


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_pass_that_memory_is_measured_by_leaves_the_model_as_it_was(policy: nn.Module, checkpointing: bool) -> None:
    policy.eval()
    calls: list[int] = []
    policy.transformer.wpe.weight.requires_grad_(False)

    def watch(*_: Any) -> None:
        trained = [parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad]
        assert all(trained), "the gradients of earlier micro-batches take memory too"
        calls.append(1)

    policy.transformer.h[0].mlp.register_forward_pre_hook(watch)
    micro_batch.worst_pass(policy, 3, length=12, keep=5, dtype=torch.bfloat16, checkpointing=checkpointing)
    assert len(calls) == 1 + checkpointing, "checkpointing computes a block twice"
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not policy.training
    assert not policy.is_gradient_checkpointing


def test_a_batch_size_cannot_be_measured_for_a_model_that_is_only_named(
    options: dict[str, Any], prompts: Dataset
) -> None:
    with pytest.raises(ValueError, match="`auto_batch_size` is True: it measures a model that is loaded"):
        MicroBatch(True).adjust(RookWorldGRPOConfig(**options), "gpt2", prompts, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({}, "memory is measured on a CUDA GPU only"), ({"objective": "exact"}, "`objective` is exact")],
)
def test_where_it_cannot_measure(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str
) -> None:
    args = RookWorldGRPOConfig(**{**options, "scale_rewards": "none", **changes})
    monkeypatch.setattr(micro_batch, "on_gpu", lambda args: bool(changes))
    with pytest.raises(ValueError, match=f"`auto_batch_size` is True: {why}"):
        check_plugins(args, [MicroBatch(auto_batch_size=True)])


def batch(rows: int, accumulation: int) -> SimpleNamespace:
    return SimpleNamespace(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
    )


@pytest.mark.parametrize(("memory", "size"), [(500.0, 80), (50.0, 20), (30.0, 10), (15.0, 2), (12.0, 1)])
def test_the_largest_micro_batch_that_fits_is_taken(memory: float, size: int) -> None:
    """A row takes 2 bytes, all else 10, so of 50 bytes 20 rows of the 80."""
    config = batch(rows=8, accumulation=10)
    micro_batch.fit_batch(config, lambda rows: 10.0 + 2.0 * rows, memory)
    assert config.per_device_train_batch_size == size
    assert config.gradient_accumulation_steps == config.steps_per_generation == 80 // size


def test_a_measurement_off_the_line_is_believed() -> None:
    config = batch(rows=8, accumulation=10)
    micro_batch.fit_batch(config, lambda rows: 10.0 + 2.0 * rows + 30.0 * (rows > 8), 50.0)  # 20 rows would need 80
    assert config.per_device_train_batch_size == 8


def test_running_out_of_memory_is_a_measurement() -> None:
    config = batch(rows=8, accumulation=10)
    micro_batch.fit_batch(config, lambda rows: 40.0 if rows == 1 else float("inf"), 50.0)
    assert config.per_device_train_batch_size == 1
    with pytest.raises(ValueError, match=r"not even one row fits \(here it takes inf GB"):
        micro_batch.fit_batch(batch(rows=8, accumulation=10), lambda rows: float("inf"), 50.0)


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="`auto_batch_size` is True: on one device not even one row fits"):
        micro_batch.fit_batch(batch(rows=4, accumulation=1), lambda rows: 100.0 * rows, 50.0)


@pytest.mark.parametrize(("theirs", "size"), [(8, 8), (40, 20)])
def test_all_processes_take_the_smallest(monkeypatch: pytest.MonkeyPatch, theirs: int, size: int) -> None:
    monkeypatch.setattr(micro_batch, "gather_object", lambda mine: [theirs, *mine])
    config = batch(rows=8, accumulation=10)
    micro_batch.fit_batch(config, lambda rows: 10.0 + 2.0 * rows, 50.0)  # 20 would fit here
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (size, 80 // size)


def test_all_processes_raise_where_one_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "gather_object", lambda mine: [0, *mine])
    with pytest.raises(ValueError, match="on one device not even one row fits"):
        micro_batch.fit_batch(batch(rows=8, accumulation=10), lambda rows: 10.0 + 2.0 * rows, 50.0)


@pytest.mark.parametrize("sampling", [500.0, 501.0])
def test_sampling_counts_too(
    policy: nn.Module,
    options: dict[str, Any],
    prompts: Dataset,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    sampling: float,
) -> None:
    """The passes are run on the CPU, and what they would take is made up: half of 1,000 bytes is allowed."""
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(micro_batch, "rollout", lambda model, prompts, **settings: drawn.append(settings))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))

    def peak_memory(step: Callable[[], object], model: nn.Module) -> float:
        before = len(drawn)
        step()
        return sampling if len(drawn) > before else 100.0

    monkeypatch.setattr(micro_batch, "peak_memory", peak_memory)
    config = RookWorldGRPOConfig(**{**options, "gradient_accumulation_steps": 3})
    too_much = pytest.raises(ValueError, match=r"sampling 24 completions at a time takes 0\.0 GB")
    with nullcontext() if sampling == 500 else too_much:
        MicroBatch(True, memory_share=0.5).adjust(config, policy, prompts, tiny_tokenizer)
    assert [(each["num_samples"], each["max_new_tokens"]) for each in drawn] == [(24, 6)]
