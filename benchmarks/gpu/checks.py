"""Stages that ask whether numbers are right: what only a GPU does differently, and what must hold on any device."""

import math
from typing import Any

import torch
from trl.trainer import grpo_trainer

from benchmarks import parity as parity_program
from benchmarks import speed
from benchmarks.common import copy_bandwidth, medians
from benchmarks.gpu.stage import Stage, peak_flops
from rookworld_trl.memory import memory_gb
from rookworld_trl.modeling import rollout as sampling
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.loading import NANO_FOLDER, load_model
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training.preparation import trl_built_here

HEAD_BOUND = (
    5e-4  # of the largest logit; a head in bf16 is off by 2e-3 and more, TF32 rounds its inputs eight times finer
)


def card(stage: Stage) -> str:
    """Its ceilings: the speed of a copy, and of matrix products in each precision, beside the data sheet's peaks."""
    name = torch.cuda.get_device_name() if stage.cuda else "cpu"
    bandwidth = copy_bandwidth(stage.device)
    figures: dict[str, Any] = {"copy_gb_per_second": round(bandwidth / 1e9, 1)}
    size = stage.pick(8192, 256)
    for precision, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        stage.tf32(precision == "tf32")
        a, b = torch.randn(2, size, size, device=stage.device, dtype=dtype).unbind(0)
        seconds = medians({"product": lambda a=a, b=b: a @ b}, 10, stage.device)["product"]
        figures[f"{precision}_tflops"] = round(2 * size**3 / seconds / 1e12, 2)
    for precision, mixed in (("float32", False), ("bf16", True)):
        peak = peak_flops(name, mixed)
        if peak is not None:
            stage.check(
                f"{precision} product over the peak in the table", figures[f"{precision}_tflops"] * 1e12 / peak, 1.05
            )
    if stage.cuda:
        capability = torch.cuda.get_device_capability()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        stage.check("bf16 is native from compute capability 8.0 on, and only there", native == (capability >= (8, 0)))
        figures |= {"capability": ".".join(map(str, capability)), "bf16_native": native}
        figures["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    stage.figures |= figures | {"peak_known": peak_flops(name, True) is not None}
    products = ", ".join(f"{precision} {figures[f'{precision}_tflops']}" for precision in ("float32", "tf32", "bf16"))
    return f"copy {figures['copy_gb_per_second']:.0f} GB/s; TFLOP/s: {products}"


def parity(stage: Stage) -> str:
    """Plain PyTorch against transformers and float64, in float32 and under bf16 autocast: see benchmarks/parity.py."""
    models = {"nano": lambda: load_model(NANO_FOLDER)} | stage.pick({"124m": parity_program.random_gpt2_small}, {})
    worst = {}
    for name, make in models.items():
        model = make().to(stage.device)
        for precision in ("float32", "bf16"):
            found = parity_program.measure(model, mixed=precision == "bf16")
            parity_program.table(f"{name}, {precision}", found)
            stage.figures[f"{name} {precision}"] = found
            for what, value in found.items():
                stage.check(f"{name} {precision}: {what}", value["ratio"], parity_program.LIMIT)
            worst[f"{name} {precision}"] = max(value["ratio"] for value in found.values())
    return "errors over transformers': " + ", ".join(f"{name} {value:.2f}" for name, value in worst.items())


def head(stage: Stage) -> str:
    """A token's logits under bf16 autocast do not depend on what it is packed with, in our head and in TRL's.

    The model's logits are made as large as a trained one's: there a head in bf16 rounds by whole steps of 1/2.
    """
    model, _ = stage.load()
    stage.tf32(True)
    ids = torch.randint(model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0)).to(stage.device)
    with torch.no_grad():
        with trl_built_here():
            grpo_trainer.add_fused_lm_head(model, outputs=("log_probs",))
        with torch.autocast(stage.device, torch.bfloat16):
            largest = model.lm_head(model.transformer(ids).last_hidden_state).abs().max().float()
            for parameter in (model.transformer.ln_f.weight, model.transformer.ln_f.bias):
                parameter.mul_(100 / largest)
            hidden = model.transformer(ids).last_hidden_state
            ours = GPT2.sharing(model)
            packed = ours.logits(hidden.flatten(0, 1))
            alone = torch.cat([ours.logits(row[None]) for row in hidden.flatten(0, 1)[:16]])
            labels = ids.clone()
            scored = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, -8:]
        exact = hidden.flatten(0, 1).double() @ model.transformer.wte.weight.double().T
        logps = exact.view(*ids.shape, -1).log_softmax(-1)[:, -9:-1].gather(-1, ids[:, -8:, None])[..., 0]
    scale = exact.abs().max()
    stage.check("logits are float32", packed.dtype == torch.float32)
    errors = {
        "alone and packed": (packed[: len(alone)] - alone).abs().max() / scale,
        "packed and exact": (packed - exact).abs().max() / scale,
        "TRL's head and exact": (scored - logps).abs().max() / scale / 2,
    }
    for what, error in errors.items():
        stage.figures[what] = error.item()
        stage.check(f"{what}, of the largest logit", error.item(), HEAD_BOUND)
    return ", ".join(f"{what} {value:.1e}" for what, value in stage.figures.items())


def draws(stage: Stage) -> str:
    """No token of probability 0 is ever drawn, whatever order the device adds probabilities in."""
    vocabulary, rows = stage.pick((50257, 4096), (50257, 64))
    generator, drawn, impossible, falls = torch.Generator().manual_seed(0), 0, 0, 0
    largest = 1 - 2**-24
    for temperature in (1.0, 0.7, 0.1):
        # From flat to sharp, with whole stretches of the vocabulary impossible.
        logits = torch.randn(rows, vocabulary, generator=generator) * torch.linspace(0.1, 30, rows)[:, None]
        logits[::3, vocabulary // 2 :] = -torch.inf
        log_probs = sampling.sampling_log_probs(logits.to(stage.device), temperature)
        cumulative = sampling.cumulative_probs(log_probs)
        falls += int((cumulative.diff(dim=-1) < 0).sum())
        for round_ in range(stage.pick(40, 4)):
            uniforms = torch.rand(rows, generator=generator) * largest
            if round_ < 2:
                uniforms[:] = (0.0, largest)[round_]
            tokens = sampling.draw(cumulative, uniforms.to(stage.device))
            impossible += int((~log_probs.gather(-1, tokens[:, None]).isfinite()).sum())
            drawn += rows
    stage.check("tokens of probability 0 that were drawn", impossible, 0)
    stage.check("places where a cumulative probability falls", falls, 0)
    stage.figures |= {"drawn": drawn, "impossible": impossible, "falls": falls}
    return f"{drawn:,} draws, {impossible} of them impossible"


def gates(stage: Stage) -> str:
    """The gates of a run's first batch, in every precision and sampler; trained weights."""
    variants = {
        "float32": {"bf16": False},
        "bf16": {"bf16": True},
        "bf16, generate": {"bf16": True, "rollout_backend": "transformers"},
        "bf16, padded rows": {"bf16": True, "share_prefixes": False},
    }
    for name, settings in variants.items():
        found = stage.train(name, nano=True, tokens=80, steps=1, **settings)
        stage.check(f"{name}: KL of the first step", abs(found["first_step"]["kl"]), 1e-3 if settings["bf16"] else 1e-6)
    return ", ".join(f"{name} {each['gates']['sampler']:.1e}" for name, each in stage.figures.items())


def memory(stage: Stage) -> str:
    """Memory is reported on every device, a run on the CPU leaves the GPU alone, and drafted rollouts take no more."""
    device, stage.device = stage.device, "cpu"
    found = stage.train("on the CPU", bf16=False, nano=True, prompts=4, samples=2, tokens=8, steps=1)
    stage.device = device
    stage.check("a run on the CPU reports memory", found["memory_gb"] > 0.05)
    if stage.cuda:
        stage.check("a run on the CPU takes none of the GPU's", torch.cuda.memory_allocated(), 0)
        block = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        reported, whole = memory_gb(), torch.cuda.get_device_properties(0).total_memory / 1e9
        stage.check("memory is at least what a tensor takes", block.nbytes / 1e9 <= reported <= whole)
        del block
    work = speed.Work(str(NANO_FOLDER), "environment", [], stage.pick(64, 2), stage.device)
    samples = stage.pick(16, 2)
    plain = stage.peak_gb(lambda: work.native(samples))
    drafted = stage.peak_gb(lambda: work.native(samples, work.drafts))
    stage.figures |= {"rows": len(work.prompts) * samples, "peak_gb": plain, "peak_gb_drafted": drafted}
    if plain is None or drafted is None:
        return f"{found['memory_gb']:.2f} GB on the CPU; peaks of rollouts are a GPU's"
    stage.check("peak of drafted rollouts over that of plain ones", drafted / plain, 2.0)
    return f"{found['memory_gb']:.2f} GB on the CPU; rollouts {plain:.2f} GB, drafted {drafted:.2f} GB"


def sampled_exactly(stage: Stage) -> str:
    """Log-probs noted while sampling are those of the model: no infinities, the same with and without drafts."""
    work = speed.Work(str(NANO_FOLDER), "environment", [], stage.pick(32, 2), stage.device)
    settings = {"num_samples": stage.pick(16, 2), "max_new_tokens": 100, "eos_token_id": work.eos}
    plain = rollout(work.model, work.prompts, **settings)
    drafted = rollout(work.model, work.prompts, drafts=work.drafts, **settings)
    finite = all(math.isfinite(logp) for each in (plain, drafted) for row in each.logps for logp in row)
    stage.check("every log-prob is finite", finite)
    differ = sum(a != b for a, b in zip(plain.completion_ids, drafted.completion_ids, strict=True))
    share = differ / len(plain.completion_ids)
    stage.check("share of samples that a draft changes", share, 0.02)  # a draw on a rounded edge
    stage.figures |= {"rows": len(plain.completion_ids), "share_changed": share}
    return f"{len(plain.completion_ids)} rows, {differ} changed by a draft"
