"""What `accelerate launch` was told and what the fields say are one truth: what is asked is done, or refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rookworld_trl.training import RookWorldGRPOConfig, placement
from rookworld_trl.training.supervised import SupervisedConfig

KINDS = pytest.mark.parametrize("kind", [RookWorldGRPOConfig, SupervisedConfig])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, whatever a configuration writes into it."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def launched(monkeypatch: pytest.MonkeyPatch, precision: str, cpu: bool = False) -> None:
    """What the launcher hands to a program of one process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu))


PRECISIONS: list[tuple[str, dict[str, bool], tuple[bool, str]]] = [
    ("bf16", {}, (True, "bf16")),
    ("bf16", {"bf16": True}, (True, "bf16")),
    ("bf16", {"bf16": False}, (False, "no")),
    ("bf16", {"fp16": True}, (False, "fp16")),
    ("no", {"bf16": True}, (True, "bf16")),
    ("no", {"bf16": False}, (False, "no")),
    ("fp16", {}, (False, "fp16")),
    ("fp16", {"bf16": True}, (True, "bf16")),
    ("fp16", {"fp16": True}, (False, "fp16")),
]


@KINDS
def test_the_precision_that_is_recorded_is_the_one_that_is_computed_in(tmp_path, monkeypatch, kind) -> None:
    for launcher, given, expected in PRECISIONS:
        launched(monkeypatch, launcher)
        args = kind(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)
        assert (args.bf16, args.mixed_precision) == expected, (launcher, given)


@KINDS
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_launch_for_a_gpu_where_there_is_none_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    settings = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False}
    assert kind(**settings).device.type == "cpu"  # nobody asked for a GPU
    launched(monkeypatch, "bf16")
    message = r"`use_cpu` is False: `accelerate launch` was to train on a GPU, and this PyTorch \(.*`--use_cpu true`"
    with pytest.raises(ValueError, match=message):
        kind(**settings)
    assert kind(**settings, use_cpu=True).device.type == "cpu"
    launched(monkeypatch, "no", cpu=True)
    assert kind(**settings).use_cpu


@pytest.mark.parametrize(("tf32", "expected"), [(True, True), (False, False), (None, True)])
def test_both_of_torchs_switches_say_the_same(tf32: bool | None, expected: bool) -> None:
    """What max-autotune reads, after what transformers 5.23 does for `tf32` and for whatever is compiled."""
    torch.backends.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    placement.agree_on_tf32(SimpleNamespace(tf32=tf32))
    assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 == expected
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == expected
