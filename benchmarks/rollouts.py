"""How fast are native rollouts beside `transformers.generate` and vLLM, and what do drafts add?

    python -m benchmarks.rollouts [--model PATH] [--prompts 8] [--samples 8 32] [--repeats 5] [--bf16]

Same weights, prompts and limits, run in turn; medians. With a model (default: the shipped one, where it is installed)
it samples completions of the shipped test rows. Three kinds of work:

* `environment`: `A:` prompts at temperature 1; the draft is the ground truth.
* `environment_sure`: the same as a model would have it that is nearly always exact: temperature 0.1, and the draft is
  the model's own greedy completion, so that nearly every sample is its draft.
* `policy`: `P:` prompts at temperature 1. Nobody knows the completion beforehand; `self_drafted` samples along the
  model's own greedy completion, whose decoding is part of the time.

Without a model it takes a random GPT-2 of `--random`, random prompts of 90 to 130 tokens and no end token: all sides do
equal work, 40 tokens a completion, and there is nothing to draft. `generate` is timed with its dynamic cache, with
`--static` also with the static one, with `--compiled` also compiled; on a GPU ours is timed with CUDA graphs too. vLLM
is timed where it is installed and a model is given, in the same precision, with log-probs. `bandwidth_share` is the
time in which memory, at the speed of a copy, gives the weights and the keys and values once a step, over that taken.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.common import RESULTS, best_device, machine, medians, shipped, wait, write_report
from rookworld_trl.modeling.loading import NANO_FOLDER, load
from rookworld_trl.modeling.rollout import Rollout, rollout

OUTPUT = RESULTS / "rollouts.json"
KINDS = {"environment": 1.0, "environment_sure": 0.1, "policy": 1.0}  # temperature of each


class Work:
    """What is sampled: a model, prompts, their expected completions and where to stop."""

    def __init__(self, model_path: str | None, kind: str, size: list[int], prompts: int, device: str) -> None:
        self.drafts: list[list[int]] | None = None
        self.eos: int | None = None
        self.temperature = 1.0
        if model_path is not None:
            self.model, tokenizer = load(model_path)
            self.model.to(device)
            self.eos, self.pad, self.max_new_tokens = tokenizer.eos_token_id, tokenizer.pad_token_id, 100
            self.temperature = KINDS[kind]
            rows = [row for row in shipped("test") if row["task"] == kind.removesuffix("_sure")][:prompts]
            self.prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
            if kind == "environment":
                targets = [tokenizer(row["target"], add_special_tokens=False)["input_ids"] for row in rows]
                self.drafts = [[*ids, tokenizer.eos_token_id] for ids in targets]
            elif kind == "environment_sure":
                self.drafts = self.greedy()
            return
        layers, width, heads, vocab_size = size
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=256,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model, self.pad, self.max_new_tokens = GPT2LMHeadModel(config).eval().to(device), 0, 40
        lengths = torch.randint(90, 131, (prompts,)).tolist()
        self.prompts = [torch.randint(1, vocab_size, (n,)).tolist() for n in lengths]

    def generate(self, samples: int, cache: str = "dynamic", compiled: bool = False) -> list[list[int]]:
        """`transformers.generate` on the left-padded prompts."""
        longest = max(map(len, self.prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in self.prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts], device=self.model.device)
        end = {"min_new_tokens": self.max_new_tokens} if self.eos is None else {"eos_token_id": self.eos}
        settings = {"do_sample": True, "top_k": 0, "temperature": self.temperature, "pad_token_id": self.pad}
        settings |= {"max_new_tokens": self.max_new_tokens, "cache_implementation": cache}
        settings |= {"compile_config": CompileConfig()} if compiled else {"disable_compile": True}
        with torch.no_grad():
            out = self.model.generate(ids, attention_mask=mask, num_return_sequences=samples, **settings, **end)
        completions = out[:, longest:].tolist()
        return [ids[: ids.index(self.eos) + 1] if self.eos in ids else ids for ids in completions]

    def native(self, samples: int, drafts: list[list[int]] | None = None, graphs: bool = False) -> list[list[int]]:
        settings = {"num_samples": samples, "max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos}
        settings |= {"drafts": drafts, "temperature": self.temperature, "cuda_graphs": graphs}
        result: Rollout = rollout(self.model, self.prompts, **settings)
        return result.completion_ids

    def greedy(self) -> list[list[int]]:
        settings = {"max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos, "temperature": 0.0}
        return rollout(self.model, self.prompts, **settings).completion_ids

    def self_drafted(self, samples: int) -> list[list[int]]:
        return self.native(samples, self.greedy())


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, when a large tensor is copied: the limit that decoding runs against."""
    source = torch.ones(1 << (28 if device == "cuda" else 26), device=device)  # 1 GiB, 256 MiB
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds[1:])


def least_bytes(work: Work, drawn: list[list[int]], bf16: bool) -> int:
    """What plain native decoding must read: the weights once a pass, and in each the keys and values of live rows.

    A prompt's are read once for all of its samples, a sample's own once each. The prefill is one pass more.
    """
    config, size = work.model.config, 2 if bf16 else 4
    weights = (work.model.num_parameters() - work.model.transformer.wpe.weight.numel()) * size
    token = 2 * config.n_layer * config.n_embd * size  # a key and a value in each layer
    samples = len(drawn) // len(work.prompts)
    total = weights
    for step in range(1, max(map(len, drawn))):  # the prefill predicts the first token
        live = [sum(len(ids) > step for ids in drawn[i : i + samples]) for i in range(0, len(drawn), samples)]
        prefixes = sum(len(ids) for ids, rows in zip(work.prompts, live, strict=True) if rows)
        total += weights + token * (prefixes + step * sum(live))
    return total


def vllm_engine(model_path: str | None, dtype: str) -> Any | None:
    """vLLM with the model; None where it is not installed, or there is no folder to start it from."""
    if model_path is None or find_spec("vllm") is None:
        return None
    from vllm import LLM

    return LLM(model_path, dtype=dtype, gpu_memory_utilization=0.3, seed=0)


def with_vllm(engine: Any, work: Work, samples: int) -> object:
    """Sampling as TRL asks for it: with log-probs, and nothing kept of the last batch, whose weights were others."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    settings = {"temperature": work.temperature, "max_tokens": work.max_new_tokens, "logprobs": 0, "detokenize": False}
    prompts = [{"prompt_token_ids": ids} for ids in work.prompts]
    return engine.generate(prompts, SamplingParams(n=samples, **settings), use_tqdm=False)


def measure(
    work: Work,
    kind: str,
    samples: int,
    bandwidth: float,
    *,
    repeats: int = 5,
    bf16: bool = False,
    more: Collection[str] = (),
    engine: Any = None,
) -> dict[str, object]:
    """Median seconds of each side, and what they say, for `samples` completions of each of the work's prompts.

    Args:
        bandwidth: see `copy_bandwidth`.
        bf16: all under autocast.
        more: further sides, of static (`generate` with its static cache), compiled and graphs.
        engine: vLLM's, if it is to be timed.
    """
    device = work.model.device.type
    sides: dict[str, Callable[[], object]] = {
        "generate": partial(work.generate, samples),
        "native": partial(work.native, samples),
    }
    if "graphs" in more:
        sides["native_graphs"] = partial(work.native, samples, graphs=True)
    if "static" in more:
        sides["generate_static"] = partial(work.generate, samples, "static")
    if "compiled" in more:
        sides["generate_compiled"] = partial(work.generate, samples, "static", compiled=True)
    if engine is not None:
        sides["vllm"] = partial(with_vllm, engine, work, samples)
    if work.drafts is not None:
        sides["drafted"] = partial(work.native, samples, work.drafts)
    elif kind == "policy":
        sides["self_drafted"] = partial(work.self_drafted, samples)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        seconds = medians(sides, repeats, device)
        drawn = work.native(samples)
    row: dict[str, object] = {"kind": kind, "prompts": len(work.prompts), "samples": samples}
    row["mean_tokens"] = round(statistics.mean(map(len, drawn)), 1)
    if work.drafts is not None:
        exact = [ids == work.drafts[i // samples] for i, ids in enumerate(drawn)]
        row["share_exact"] = round(statistics.mean(exact), 3)
    row["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
    row["speedup"] = {name: round(seconds["generate"] / seconds[name], 2) for name in sides if name != "generate"}
    floor = least_bytes(work, drawn, bf16) / bandwidth
    plain = [name for name in ("native", "native_graphs") if name in seconds]
    row["bandwidth_share"] = {name: round(floor / seconds[name], 3) for name in plain}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(NANO_FOLDER))
    parser.add_argument("--random", type=int, nargs=4, metavar=("LAYERS", "WIDTH", "HEADS", "VOCABULARY"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--bf16", action="store_true", help="all sides under bf16 autocast")
    parser.add_argument("--static", action="store_true", help="`generate` with the static cache too")
    parser.add_argument("--compiled", action="store_true", help="`generate` compiled too")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    device = best_device()
    model_path = None if arguments.random else arguments.model
    kinds = arguments.kinds if model_path else ["random"]
    results, parameters, bandwidth = [], 0, copy_bandwidth(device)
    engine = vllm_engine(model_path, "bfloat16" if arguments.bf16 else "float32")
    more = [name for name in ("static", "compiled") if getattr(arguments, name)]
    more += ["graphs"] if device == "cuda" else []
    for kind in kinds:
        work = Work(model_path, kind, arguments.random or [4, 128, 4, 512], arguments.prompts, device)
        parameters = work.model.num_parameters()
        for samples in arguments.samples:
            options = {"repeats": arguments.repeats, "bf16": arguments.bf16, "more": more, "engine": engine}
            results.append(measure(work, kind, samples, bandwidth, **options))
            print(json.dumps(results[-1]), flush=True)
    report = {
        "parameters": parameters,
        "bf16_autocast": arguments.bf16,
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        **machine(device),
        "results": results,
    }
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
