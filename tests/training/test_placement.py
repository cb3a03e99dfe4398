"""Devices: the reference elsewhere gives the same numbers by the same path, and micro-batches are chosen by memory."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.overrides import TorchFunctionMode

from rookworld_trl.modeling.gpt2 import EAGER, next_multiple
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer, placement
from rookworld_trl.training.config import COMPILE_BUCKET, contradictions
from rookworld_trl.training.supervised import SupervisedConfig

Make = Callable[..., RookWorldGRPOTrainer]
CPU = torch.device("cpu")


class Moves(TorchFunctionMode):
    """Counts tensors sent to a device, without a second device being there."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.device):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def trained(make: Make, **changes: Any) -> RookWorldGRPOTrainer:
    torch.manual_seed(0)
    trainer = make(beta=0.1, learning_rate=1e-2, max_steps=3, seed=1, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("share", [True, False], ids=["shared prefixes", "transformers' forward"])
def test_a_reference_on_another_device_gives_the_same_run(make_trainer: Make, share: bool) -> None:
    beside = trained(make_trainer, share_prefixes=share)
    elsewhere = trained(make_trainer, share_prefixes=share, ref_device="cpu")
    assert (beside.scorer.device, elsewhere.scorer.device) == (None, CPU)
    for log, other in zip(beside.state.log_history, elsewhere.state.log_history, strict=True):
        assert {k: v for k, v in log.items() if k in ("kl", "loss", "reward")} == {
            k: v for k, v in other.items() if k in ("kl", "loss", "reward")
        }
    assert beside.state.log_history[-2]["kl"] > 1e-6
    for name, tensor in beside.model.state_dict().items():
        assert torch.equal(tensor, elsewhere.model.state_dict()[name]), name


def test_inputs_go_there_and_log_probs_come_back(make_trainer: Make) -> None:
    trainer = make_trainer(beta=0.1, ref_device="cpu")
    ids, mask = torch.randint(3, 20, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    with torch.no_grad():
        for model, expected in ((trainer.ref_model, [(4, 9), (4, 9), (4, 3)]), (trainer.model, [])):
            with Moves() as moves:
                trainer._get_per_token_logps_and_entropies(model, ids, mask, 3)
            assert [shape for shape in moves.shapes if shape in ((4, 9), (4, 3))] == expected


def test_the_policy_is_never_wrapped_in_data_parallel(make_trainer: Make, options: dict[str, Any]) -> None:
    config = RookWorldGRPOConfig(**options)
    config._n_gpu = 2  # what transformers finds in one process that sees two
    config.settle_devices()
    assert config.n_gpu == 1
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, nn.DataParallel)


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "home", "processes", "gpus", "fixed", "expected"),
    [
        ("auto", CPU, 1, 0, False, None),
        ("auto", GPU, 1, 1, False, None),
        ("auto", GPU, 1, 2, False, torch.device("cuda", 1)),
        ("auto", torch.device("cuda", 1), 1, 2, False, GPU),
        ("auto", GPU, 2, 2, False, None),  # the second GPU has a policy of its own
        ("auto", GPU, 1, 2, True, None),
        ("cpu", GPU, 2, 2, False, CPU),
        ("cuda:1", GPU, 1, 2, False, torch.device("cuda", 1)),
        ("cuda:0", GPU, 1, 1, False, GPU),
    ],
)
def test_which_device(
    wanted: str, home: torch.device, processes: int, gpus: int, fixed: bool, expected: torch.device | None
) -> None:
    assert placement.reference_device(wanted, home, processes, gpus, fixed) == expected


def test_a_gpu_that_is_not_there(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"`ref_device` is 'cuda:1': this process sees 0 GPU"):
        make_trainer(beta=0.1, ref_device="cuda:1")
    with pytest.raises(ValueError, match=r"`ref_device` is 'cpu': there is no reference"):
        make_trainer(beta=0.0, ref_device="cpu")


def test_each_process_would_take_the_same_gpu(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = RookWorldGRPOConfig(**{**options, "ref_device": "cuda:1"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "every process would put its reference there" in " ".join(contradictions(config))


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        ((7, 5), {}, {"bf16": False, "tf32": None}),  # a T4: bf16 by emulation only
        ((8, 6), {}, {"bf16": True, "tf32": True}),
        ((9, 0), {"tf32": False}, {"bf16": True, "tf32": False}),
        ((9, 0), {"bf16": False}, {"bf16": False, "tf32": None}),  # the gates hold float32 to 1e-4
        ((9, 0), {"fp16": True}, {"bf16": False, "tf32": None}),
        ((9, 0), {"use_cpu": True}, {"bf16": False, "tf32": None}),
    ],
)
def test_precision_by_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], given: dict[str, bool], expected: dict[str, Any]
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    config = SimpleNamespace(**{"bf16": None, "fp16": False, "tf32": None, "use_cpu": False, **given})
    RookWorldGRPOConfig.choose_precision(config)
    assert {name: getattr(config, name) for name in expected} == expected


LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER", "ACCELERATE_DYNAMO_MODE": "default"}
LAUNCHED |= {"ACCELERATE_DYNAMO_USE_DYNAMIC": "True", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}


COMPILED: list[tuple[bool, dict[str, Any], dict[str, Any]]] = [  # launched so, the fields, and what torch.compile gets
    (False, {}, {}),
    (False, {"torch_compile": True}, {"backend": "inductor"}),
    (False, {"torch_compile_backend": "eager"}, {"backend": "eager"}),
    (False, {"torch_compile_mode": "max-autotune"}, {"backend": "inductor", "mode": "max-autotune"}),
    (False, {"torch_compile": False, "torch_compile_backend": "eager"}, {}),
    (True, {}, {"backend": "aot_eager", "dynamic": True}),
    (True, {"torch_compile": True}, {"backend": "aot_eager", "dynamic": True}),
    (True, {"torch_compile_backend": "eager"}, {"backend": "eager", "dynamic": True}),
    (True, {"torch_compile": False}, {}),
    (True, {"torch_compile_backend": "no"}, {}),
]


@pytest.mark.parametrize("config_class", [RookWorldGRPOConfig, SupervisedConfig])
@pytest.mark.parametrize(("launched", "given", "expected"), COMPILED)
def test_accelerate_says_what_is_compiled_unless_the_fields_do(
    tmp_path, monkeypatch, config_class, launched, given, expected
) -> None:
    """What the plugin that transformers makes of the fields gives `torch.compile`; read back from a file, the same."""
    for name, value in LAUNCHED.items() if launched else ():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        config = config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)
        plugin = TorchDynamoPlugin(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
        off = plugin.backend == DynamoBackend.NO
        assert ({} if off else {"backend": plugin.backend.value.lower(), **plugin.to_kwargs()}) == expected
        assert config.torch_compile == bool(expected)
        fields = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
        given = {name: getattr(config, name) for name in fields}


@pytest.mark.slow
def test_what_accelerate_compiles_shares_prefixes(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launched run against an eager one: the same numbers, by compiled blocks, in a bounded number of graphs."""
    torch._dynamo.reset()
    case = {"rollout_backend": "native", "task_sampling": {"": {"temperature": 0.7}}, "num_iterations": 2}
    eager = trained(make_trainer, **case)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    compiled = trained(make_trainer, **case, throughput=True)
    assert compiled.scorer.shared
    assert (compiled.scorer.blocks.padded, eager.scorer.blocks) == (next_multiple, EAGER)
    for log, other in zip(eager.state.log_history[:-1], compiled.state.log_history[:-1], strict=True):
        for key in {"kl", "loss", "reward", "grad_norm", "entropy"} & log.keys():
            assert log[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
        assert "perf/compiled_graphs" not in log
    graphs = [log["perf/compiled_graphs"] for log in compiled.state.log_history[:-1]]
    assert 0 < graphs[0] <= graphs[-1] <= 4, "two functions, with and without gradients"


@pytest.mark.parametrize(("mode", "shared"), [("default", True), ("reduce-overhead", False), ("max-autotune", False)])
def test_blocks_are_no_cuda_graphs(make_trainer: Make, mode: str, shared: bool) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": mode}
    assert make_trainer(**options).scorer.shared == shared


@pytest.mark.parametrize(
    ("compiled", "tf32", "precision", "expected"),
    [(False, None, "no", "tf32"), (True, True, "no", "tf32"), (True, None, "bf16", "tf32"), (True, None, "no", "ieee")],
)
def test_float32_stays_float32_where_accelerate_would_take_tf32(
    compiled: bool, tf32: bool | None, precision: str, expected: str
) -> None:
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        config = SimpleNamespace(torch_compile=compiled, tf32=tf32)
        placement.keep_float32(config, SimpleNamespace(mixed_precision=precision))
        assert products.fp32_precision == expected
    finally:
        products.fp32_precision = before


def test_compiled_shapes_are_padded_to_buckets(options: dict[str, Any]) -> None:
    config = RookWorldGRPOConfig(**options)
    assert config.pad_to_multiple_of is None
    config.torch_compile = True  # not by the constructor, which tells accelerate through the environment
    for given, expected in ((None, COMPILE_BUCKET), (32, 32)):
        config.pad_to_multiple_of = given
        config.settle_devices()
        assert config.pad_to_multiple_of == expected


@pytest.mark.parametrize(
    ("mode", "accumulation", "refused"),
    [("reduce-overhead", 2, True), ("max-autotune", 2, True), ("reduce-overhead", 1, False), ("default", 2, False)],
)
def test_cuda_graphs_would_overwrite_accumulated_gradients(
    options: dict[str, Any], mode: str, accumulation: int, refused: bool
) -> None:
    config = RookWorldGRPOConfig(**options)
    config.torch_compile, config.torch_compile_mode = True, mode
    config.gradient_accumulation_steps = accumulation
    assert any(line.startswith("torch_compile_mode: ") for line in contradictions(config)) == refused


@pytest.mark.slow
@torch._dynamo.config.patch(specialize_float=False)  # and as it was behind the test; monkeypatch would delete it
def test_checkpointed_blocks_are_compiled(make_trainer: Make) -> None:
    """With lengths of any kind in one graph, as launched."""
    case = {"torch_compile": True, "torch_compile_backend": "eager", "share_prefixes": False}
    make_trainer(**case)
    assert not torch._dynamo.config.specialize_float
    make_trainer(**case, activation_checkpointing=True)
    assert torch._dynamo.config.specialize_float


@pytest.mark.slow
def test_a_compiled_reference_that_follows_is_kept(make_trainer: Make) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "share_prefixes": False}
    follows = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    trainer = trained(make_trainer, **follows, save_strategy="steps", save_steps=3, **compiled)
    plain = trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)
    assert plain is not trainer.ref_model
    again = make_trainer(beta=0.1, learning_rate=1e-2, max_steps=4, seed=1, save_strategy="no", **follows)
    again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))  # not compiled any more
    assert "kl" in again.state.log_history[-2]


FREED = """
import resource, torch
from rookworld_trl.memory import keep_freed_memory
kept = keep_freed_memory()
for _ in range(40):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_once_freed_is_used_again() -> None:
    """Five tensors of 64 MiB after many of that size: without it, each is of fresh pages, 320 MiB in all.

    Many, since glibc before 2.38 asks for a few bytes more than an aligned block has that it freed (its bug 14581);
    only when its caches of small pieces are full does the block meet its neighbour again.
    """
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    kept, fresh = done.stdout.split()
    assert kept == "True"
    assert int(fresh) < 64
