"""Stages that ask how fast and in what memory: rollouts, learning, whole steps, and ways to place and compile them."""

import socket
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import speed
from benchmarks.gpu.stage import Stage, short
from rookworld_trl.modeling.loading import NANO_FOLDER

STEP = {"dataset": "shipped", "mix_env_ratio": 0.25, "max_steps": 2, "save_strategy": "no", "report_to": "none"}


def rollouts(stage: Stage) -> str:
    """Native rollouts of 64 completions beside `generate`: random 124M, and trained nano."""
    size = stage.pick([12, 768, 12, 50257], [2, 32, 2, 512])
    prompts, samples, repeats = stage.pick((8, 8, 5), (2, 2, 1))
    cells = []
    for name, path, kind in (
        ("124m", None, "random"),
        ("nano", str(NANO_FOLDER), "environment"),
        ("nano", str(NANO_FOLDER), "policy"),
    ):
        work = speed.Work(path, kind, size, prompts, stage.device)
        for bf16 in (False, True):
            stage.tf32(bf16)
            row = speed.sampled(work, kind, samples, repeats=repeats, bf16=bf16, static=True)
            label = f"{name} {kind} {'bf16' if bf16 else 'float32'}"
            stage.figures[label] = row
            cells.append(f"{label} {row['speedup']['native']}x generate")  # type: ignore[index]
    return "; ".join(cells)


def learning(stage: Stage) -> str:
    """The learning pass on shared prefixes beside TRL's padded one, with equal gradients."""
    for bf16 in (False, True):
        stage.tf32(bf16)
        model, _ = stage.load(stage.pick(None, NANO_FOLDER))
        found = speed.learned(model, *stage.pick((8, 16, 64, 5), (2, 2, 4, 1)), bf16)
        for row in found:
            label = f"{row['shape']} {'bf16' if bf16 else 'float32'}"
            stage.figures[label] = row
            stage.check(f"{label}: gradients differ", row["relative_gradient_difference"], 0.05 if bf16 else 1e-3)
    return ", ".join(f"{name} {row['speedup']}x" for name, row in stage.figures.items())


def step_8x8(stage: Stage) -> str:
    """A whole step of 8 prompts x 8 completions of 144 tokens on 124M parameters."""
    for name, settings in (
        ("float32", {"bf16": False}),
        ("bf16", {"bf16": True}),
        ("bf16, padded rows", {"bf16": True, "share_prefixes": False}),
        ("bf16, checkpointing", {"bf16": True, "share_prefixes": False, "activation_checkpointing": True}),
    ):
        stage.train(name, **settings)
    return "; ".join(f"{name}: {short(found)}" for name, found in stage.figures.items())


def step_32x16(stage: Stage) -> str:
    """A whole step of 32 prompts x 16 completions, in micro-batches of 32 and of 128."""
    for rows in (32, 128):
        stage.train(f"bf16, {rows} rows at a time", bf16=True, prompts=32, samples=16, micro_batch=rows, steps=2)
    phases = stage.figures["bf16, 128 rows at a time"]["phases"]
    parts = ", ".join(f"{name} {seconds:.2g}" for name, seconds in phases.items())
    return "; ".join(f"{name}: {short(found)}" for name, found in stage.figures.items()) + f" ({parts})"


def reference(stage: Stage) -> str:
    """The reference on the CPU against beside the policy."""
    beside, apart = stage.train("same device", bf16=True), stage.train("on the CPU", bf16=True, ref_device="cpu")
    trained = stage.train("trained weights, on the CPU", bf16=True, ref_device="cpu", nano=True, tokens=80, steps=1)
    stage.check("KL of the first step with the reference apart", abs(trained["first_step"]["kl"]), 1e-3)
    return f"beside: {short(beside)}; on the CPU: {short(apart)}"


def compiled(stage: Stage) -> str:
    """Compiled against eager, on shared prefixes and on padded rows: equal numbers, seconds of a step once warm."""
    backend = stage.pick("inductor", "aot_eager")  # inductor's C++ for a CPU takes a minute
    # Rewards of random weights are all equal, and an entropy term gives the gradient something to be.
    common = {"bf16": True, "entropy_coef": -1.0, "steps": 5, "nano": stage.tiny}
    compile_ = {"torch_compile": True, "torch_compile_backend": backend}
    cells = []
    for rows, share in (("shared prefixes", True), ("padded rows", False)):
        eager = stage.train(f"eager, {rows}", share_prefixes=share, **common)
        found = stage.train(f"compiled, {rows}", share_prefixes=share, **compile_, **common)
        norms = [each["first_step"]["grad_norm"] for each in (eager, found)]
        stage.check(f"{rows}: relative difference of the first gradients' norms", abs(norms[1] / norms[0] - 1), 0.05)
        if share:  # two functions, with and without gradients, once for the first length and once for all
            stage.check("graphs", found["graphs"], 8)
        warm = found["first_step"]["step_time"]
        cells.append(f"{rows}: eager {short(eager)}, compiled {short(found)}, first step {warm:.0f} s")
    return "; ".join(cells)


def paged_adamw(stage: Stage) -> str:
    """AdamW whose moments move to the CPU when the GPU is full."""
    stage.needs(stage.cuda, "its pages are a GPU's")
    stage.needs(find_spec("bitsandbytes") is not None, "bitsandbytes is not installed")
    plain, paged = stage.train("adamw", bf16=True), stage.train("paged", bf16=True, optim="paged_adamw_32bit")
    return f"AdamW: {short(plain)}; paged: {short(paged)}"


def launched(stage: Stage, config: str, processes: int, program: str = "recipes/grpo.py", **settings: Any) -> str:
    """Two steps by `accelerate launch` with a file of accelerate_configs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    command += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1"]
    command += ["--main_process_port", str(port), "--mixed_precision", stage.pick("bf16", "no")]
    command += ["--dynamo_backend", stage.pick("inductor", "eager")]
    command += [program] if program.endswith(".py") else ["-m", program]
    items = stage.pick(64, 2)
    prompts, samples, tokens = stage.pick((8, 8, 144), (4, 2, 8))
    sizes = {
        "model": stage.fresh(),
        "num_generations": samples,
        "per_device_train_batch_size": prompts * samples // processes,
        "max_completion_length": tokens,
        "eval_policy_items": items,
        "eval_environment_items": items,
        "bf16": str(not stage.tiny).lower(),
    }
    steps = stage.recipe(STEP | sizes | settings, *command)
    stage.check("steps", len(steps) == STEP["max_steps"])
    stage.check("KL of the first step", abs(steps[0]["kl"]), stage.pick(1e-3, 1e-6))
    names = ("kl", "loss", "grad_norm", "reward", "step_time", "perf/memory_gb")
    stage.figures["steps"] = [{name: step[name] for name in names if name in step} for step in steps]
    return f"{steps[-1]['step_time']:.3g} s a step, {steps[-1]['perf/memory_gb']:.1f} GB"


def fsdp2(stage: Stage) -> str:
    """FSDP2 over one card: sharding's own code path, checkpoint and evaluation, with nobody to share with."""
    return launched(stage, "fsdp2", 1, "recipes/grpo.py" if stage.cuda else "tests.support.sharded_on_cpu")


def by_name(stage: Stage) -> None:
    """Models that TRL loads by name, policy and reference each whole on one device: the reference on the second card
    where there is one."""
    home, second = ("cuda:0", "cuda:1") if stage.cuda else ("cpu", "cpu")
    cases: dict[str, dict[str, Any]] = {
        "by name": {},
        "by name, padded rows": {"share_prefixes": False},
        "by name, checkpointing": {"share_prefixes": False, "activation_checkpointing": True},
    }
    for what, settings in cases.items():
        found = stage.train(what, **{"bf16": True, "named": stage.fresh(), "steps": 2, **settings})
        stage.check(f"{what}: policy on {home}, reference on {second}", found["devices"] == [home, second])
        # Random weights earn equal rewards, so that nothing but rounding is learned in two steps.
        stage.check(f"{what}: KL of the first step", abs(found["first_step"]["kl"]), 1e-3)


def second_card(stage: Stage) -> str:
    """The reference on a second card, of models by name too, then both cards training; the other process waits for an
    evaluation longer than the process group's time limit."""
    cards = torch.cuda.device_count() if stage.cuda else 0
    stage.needs(cards > 1, f"there {'is one card' if cards else 'are no cards'}")
    apart = stage.train("reference on the second", bf16=True, ref_device="cuda:1")
    by_name(stage)
    both = launched(stage, "multi_gpu", 2, ddp_timeout=10, eval_policy_items=512, eval_environment_items=512)
    return f"reference there: {short(apart)}; both train: {both}"


def vllm(stage: Stage) -> str:
    """vLLM on the training card, its log-probs held by the gates."""
    stage.needs(stage.cuda, "its CPU build has an environment of its own: make test-vllm")
    stage.needs(find_spec("vllm") is not None, "vLLM is not installed")
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.25}
    found = stage.train("vllm", bf16=True, vllm_max_model_length=1024, **settings)
    return short(found)
