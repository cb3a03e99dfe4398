"""How fast is it? Scoring completions, sampling, learning, whole steps and the exact gradient, beside what is stock.

    python -m benchmarks.speed                                  all five, into benchmarks/results/NAME.json
    python -m benchmarks.speed rollouts --model PATH [--prompts 8] [--samples 8 32] [--bf16] [--output FILE]

Sides run in turn in one process; medians. On a CPU, where one thread does the work, seconds are the process's own.

* `scoring`: completions a second on one core. The true completion, a damaged one and an unparsable one of shipped rows
  in turn, through the TRL reward functions, every row once a pass (no prompt is met twice within the scorer's cache).
* `rollouts`: native sampling beside `transformers.generate`. `environment`: `A:` prompts, the draft is the truth.
* `learning`: reference without gradients, then policy with its backward pass, on shared prefixes and by TRL's padded
  pass with its fused head and the position hook. Random tokens in two shapes: `policy`, completions that agree nowhere,
  and `environment`, 60 % of whose completions are the same and the others leave it somewhere.
* `step`: entire steps in float32, sampling to optimizer: stock TRL, the same with the positions that left padding
  needs, and ours. A round makes a new trainer of each side and drops its first step. Dropout is off, or stock would do
  other work.
* `exact`: steps at equal prompts, sampled (16 completions a prompt) and exact (2), and how forward and backward of a
  `P:` completion grow with its legal moves: the exponent is that of a straight line in logarithms.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import (
    ALIKE,
    RESULTS,
    REWARDS,
    StepClock,
    best_device,
    busy,
    copy_bandwidth,
    machine,
    medians,
    own_clock,
    padded,
    random_model,
    shipped,
    timed_training,
    write_report,
)
from rookworld_trl.chess import rewards
from rookworld_trl.chess.mixing import mix
from rookworld_trl.chess.rewards.decisions import ChessPoints
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.hooks import install_position_hook
from rookworld_trl.modeling.loading import NANO_FOLDER, load, load_model
from rookworld_trl.modeling.rollout import Rollout, rollout
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer, scoring
from rookworld_trl.training.exact import Points, score_tree

KINDS = ("environment", "policy")  # of rollouts
SHAPES = {"policy": (77, 25, 0.0), "environment": (110, 40, 0.6)}  # prompt, completion, share of equal completions
SIDES = ("stock", "stock_positions", "ours")  # of whole steps
BATCH = 16  # completions whose points are scored at once
BUCKETS = (5, 12, 20, 28, 36, 44)  # legal moves: lower bound of each bucket of positions
Score = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


# Scoring


def damaged(row: dict[str, Any], index: int) -> str:
    """The truth, the truth with one character exchanged, or an unparsable text, in turn."""
    target = row["target"]
    if index % 3 == 0:
        return target
    middle = len(target) // 2
    return target[:middle] + ("1" if index % 3 == 1 else "?") + target[middle + 1 :]


def scored(function: Callable[..., list[float | None]], rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Median and range of rows per second over `repeats` passes of batches of 64."""
    completions = [damaged(row, index) for index, row in enumerate(rows)]
    batches = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        columns = {name: [row[name] for row in part] for name in part[0] if name != "prompt"}
        batches.append(([row["prompt"] for row in part], completions[start : start + 64], columns))
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        for prompts, texts, columns in batches:
            function(prompts=prompts, completions=texts, **columns)
        rates.append(len(rows) / (time.process_time() - started))
    return {
        "rows": len(rows),
        "repeats": repeats,
        "rows_per_second_median": round(statistics.median(rates)),
        "rows_per_second_min": round(min(rates)),
        "rows_per_second_max": round(max(rates)),
    }


def measure_scoring(arguments: argparse.Namespace) -> dict[str, Any]:
    tasks = {
        "environment": (rewards.environment_reward, rewards.environment_reward_continuous),
        "policy": (rewards.policy_reward, rewards.policy_reward_continuous),
    }
    results: dict[str, Any] = {}
    for task, functions in tasks.items():
        rows = [row for row in shipped("train") if row["task"] == task][: arguments.rows]
        for function in functions:
            results[function.__name__] = scored(function, rows, arguments.repeats) | {"source": "shipped"}
    unit = "completions per CPU second, one core"
    return {"unit": unit, "results": results, "python": platform.python_version(), **machine("cpu")}


# Rollouts


class Work:
    """What is sampled: a model, prompts, their expected completions and where to stop."""

    def __init__(self, model_path: str | None, kind: str, size: list[int], prompts: int, device: str) -> None:
        self.drafts: list[list[int]] | None = None
        self.eos: int | None = None
        if model_path is not None:
            self.model, tokenizer = load(model_path)
            self.model.to(device)
            self.eos, self.pad, self.max_new_tokens = tokenizer.eos_token_id, tokenizer.pad_token_id, 100
            rows = [row for row in shipped("test") if row["task"] == kind][:prompts]
            self.prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
            if kind == "environment":
                targets = [tokenizer(row["target"], add_special_tokens=False)["input_ids"] for row in rows]
                self.drafts = [[*ids, tokenizer.eos_token_id] for ids in targets]
            return
        self.model, self.pad, self.max_new_tokens = random_model(*size).to(device), 0, 40  # type: ignore[arg-type]
        lengths = torch.randint(90, 131, (prompts,)).tolist()
        self.prompts = [torch.randint(1, size[-1], (n,)).tolist() for n in lengths]

    def generate(self, samples: int, cache: str = "dynamic") -> list[list[int]]:
        """`transformers.generate` on the left-padded prompts."""
        longest = max(map(len, self.prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in self.prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts], device=self.model.device)
        end = {"min_new_tokens": self.max_new_tokens} if self.eos is None else {"eos_token_id": self.eos}
        settings = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": self.pad}
        settings |= {"max_new_tokens": self.max_new_tokens, "cache_implementation": cache, "disable_compile": True}
        with torch.no_grad():
            out = self.model.generate(ids, attention_mask=mask, num_return_sequences=samples, **settings, **end)
        completions = out[:, longest:].tolist()
        return [ids[: ids.index(self.eos) + 1] if self.eos in ids else ids for ids in completions]

    def native(self, samples: int, drafts: list[list[int]] | None = None) -> list[list[int]]:
        settings = {"num_samples": samples, "max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos}
        settings |= {"drafts": drafts, "temperature": 1.0}
        result: Rollout = rollout(self.model, self.prompts, **settings)
        return result.completion_ids


def sampled(
    work: Work,
    kind: str,
    samples: int,
    *,
    repeats: int = 5,
    bf16: bool = False,
    static: bool = False,
) -> dict[str, object]:
    """Median seconds of each side, and what they say, for `samples` completions of each of the work's prompts.

    Args:
        bf16: all under autocast.
        static: a side more, `generate` with its static cache.
    """
    device = work.model.device.type
    sides: dict[str, Callable[[], object]] = {
        "generate": partial(work.generate, samples),
        "native": partial(work.native, samples),
    }
    if static:
        sides["generate_static"] = partial(work.generate, samples, "static")
    if work.drafts is not None:
        sides["drafted"] = partial(work.native, samples, work.drafts)
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
    return row


def measure_rollouts(arguments: argparse.Namespace) -> dict[str, Any]:
    device, model = best_device(), str(arguments.model)
    results, parameters = [], 0
    for kind in KINDS:
        work = Work(model, kind, [], arguments.prompts or 8, device)
        parameters = work.model.num_parameters()
        for samples in arguments.samples or (8, 32):
            results.append(sampled(work, kind, samples, repeats=arguments.repeats, bf16=arguments.bf16))
            print(json.dumps(results[-1]), flush=True)
    speed = {"bf16_autocast": arguments.bf16, "copy_gb_per_second": round(copy_bandwidth(device) / 1e9, 1)}
    return {"parameters": parameters, **speed, **machine(device), "results": results}


# Learning


def random_rows(vocab_size: int, prompts: int, samples: int, shape: tuple[int, int, float]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (prompts * samples, P + C); prompts lack 0 to 9 of P tokens, on the left."""
    generator = torch.Generator().manual_seed(0)
    prompt_length, length, equal = shape

    def tokens(*size: int) -> Tensor:
        return torch.randint(1, vocab_size, size, generator=generator)

    rows, masks = [], []
    for _ in range(prompts):
        prompt, truth = tokens(prompt_length), tokens(length)
        mask = torch.ones(prompt_length + length, dtype=torch.long)
        mask[: int(torch.randint(10, (), generator=generator))] = 0
        for _ in range(samples):
            completion = tokens(length)
            if equal:
                same = torch.rand((), generator=generator) < equal
                common = length if same else int(torch.randint(length, (), generator=generator))
                completion[:common] = truth[:common]
            rows.append(torch.cat([prompt, completion]) * mask)
            masks.append(mask)
    return torch.stack(rows), torch.stack(masks)


def padded_score(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-keep] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -keep:]


def shared_score(model: nn.Module, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    return scoring.score(GPT2.sharing(model), 1.0, ids, mask, keep, compute_entropy=torch.is_grad_enabled())[0]


def phase(
    score: Score, policy: nn.Module, reference: nn.Module, ids: Tensor, mask: Tensor, keep: int, rows: int
) -> None:
    chunks = list(zip(ids.split(rows), mask.split(rows), strict=True))
    with torch.no_grad():
        for chunk in chunks:
            score(reference, *chunk, keep)
    policy.zero_grad(set_to_none=True)
    for chunk in chunks:
        score(policy, *chunk, keep).mean().backward()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def learned(
    policy: GPT2LMHeadModel, prompts: int, samples: int, micro_batch: int, repeats: int, bf16: bool = False
) -> list[dict[str, Any]]:
    """Both sides at both shapes, on the policy's device."""
    device, reference, results = policy.device.type, copy.deepcopy(policy), []
    for model, outputs in ((policy, ("log_probs", "entropy")), (reference, ("log_probs",))):
        install_position_hook(model)
        add_fused_lm_head(model, outputs=outputs)
    gradients: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        ids, mask = random_rows(policy.config.vocab_size, prompts, samples, shape)
        batch = ids.to(device), mask.to(device), shape[1], micro_batch

        def run(side: str, score: Score, batch: tuple[Any, ...] = batch) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                phase(score, policy, reference, *batch)
            gradients[side] = gradient(policy)

        sides = {side: partial(run, side, score) for side, score in (("stock", padded_score), ("shared", shared_score))}
        seconds = medians(sides, repeats, device, time.process_time if device == "cpu" else time.perf_counter)
        difference = (gradients["shared"] - gradients["stock"]).norm() / gradients["stock"].norm()
        result = {
            "shape": name,
            "rows": len(ids),
            "seconds": {side: round(value, 4) for side, value in seconds.items()},
            "rows_per_second": {side: round(len(ids) / value) for side, value in seconds.items()},
            "speedup": round(seconds["stock"] / seconds["shared"], 2),
            "relative_gradient_difference": float(f"{difference.item():.2g}"),
        }
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def measure_learning(arguments: argparse.Namespace) -> dict[str, Any]:
    policy = random_model(4, 128, 4, 512) if arguments.model == NANO_FOLDER else load_model(arguments.model)
    prompts, samples, rows = arguments.prompts or 4, (arguments.samples or [16])[0], 64
    results = learned(policy, prompts, samples, rows, arguments.repeats, arguments.bf16)
    sizes = {"parameters": policy.num_parameters(), "prompts": prompts, "samples": samples, "micro_batch": rows}
    return {**sizes, "bf16_autocast": arguments.bf16, "device": "cpu", **machine("cpu"), "results": results}


# Whole steps


def steps_of(side: str, model_path: Path, sizes: dict[str, Any], seed: int) -> tuple[list[float], float]:
    """Seconds of the timed steps of one side, and the mean length of its completions in tokens."""
    model, tokenizer = load(model_path)
    rows = sizes["prompts"] * sizes["samples"]
    with tempfile.TemporaryDirectory() as folder:
        config = RookWorldGRPOConfig if side == "ours" else GRPOConfig
        args = config(
            output_dir=folder,
            per_device_train_batch_size=rows // sizes["micro_batches"],
            gradient_accumulation_steps=sizes["micro_batches"],
            num_generations=sizes["samples"],
            max_completion_length=80,
            temperature=1.0,
            beta=0.01,
            learning_rate=1e-4,
            loss_type="dapo",
            scale_rewards="batch",
            max_steps=sizes["steps"] + 1,
            seed=seed,
            **ALIKE,
        )
        order = {"prompts_per_batch": sizes["prompts"], "batches": sizes["steps"] + 1, "seed": seed}
        prompts = mix(shipped("train"), sizes["env_ratio"], **order)
        trainer_class = RookWorldGRPOTrainer if side == "ours" else GRPOTrainer
        if side == "ours":
            trainer: GRPOTrainer = trainer_class(model, REWARDS, args, prompts, processing_class=tokenizer)
        else:  # stock loads its reference by name
            trainer = trainer_class(str(model_path), REWARDS, args, prompts, processing_class=tokenizer)
            if side == "stock_positions":
                install_position_hook(trainer.model)
                install_position_hook(trainer.ref_model)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        lengths = [
            log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log
        ]
    return clock.seconds[1:], statistics.mean(lengths)


def measure_step(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = {"prompts": arguments.prompts or 16, "samples": (arguments.samples or [16])[0]}
    sizes |= {"env_ratio": 0.25, "micro_batches": 2}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    lengths: dict[str, list[float]] = {side: [] for side in SIDES}
    for round_ in range(arguments.rounds):
        for side in SIDES:
            timed, length = steps_of(side, arguments.model, {**sizes, "steps": 2}, seed=round_)
            seconds[side] += timed
            lengths[side].append(length)
            print(f"round {round_ + 1} {side}: {', '.join(f'{value:.2f}' for value in timed)} s", flush=True)
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        **sizes,
        "timed_steps": {side: len(values) for side, values in seconds.items()},
        "seconds_per_step": {side: round(value, 3) for side, value in middle.items()},
        "speedup": {side: round(middle[side] / middle["ours"], 2) for side in SIDES if side != "ours"},
        "mean_completion_tokens": {side: round(statistics.mean(values), 1) for side, values in lengths.items()},
        **machine("cpu"),
    }


# The exact gradient


def sampled_and_exact(prompts: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of both sides, a median for each round."""
    seconds: dict[str, list[float]] = {"sampled": [], "exact": []}
    for _ in range(rounds):
        for side, samples in (("sampled", 16), ("exact", 2)):
            model, tokenizer = load("nano")
            points = ChessPoints(tokenizer) if side == "exact" else None
            measured = timed_training(
                model,
                tokenizer,
                prompts=prompts,
                samples=samples,
                tokens=80,
                steps=4,
                device="cpu",
                micro_batch=32 if side == "exact" else 128,
                find_points=points,
                clock=own_clock("cpu"),
                objective=side,
                scale_rewards="group",
                beta=0.0,
            )
            seconds[side].append(measured["seconds_per_step"])
            print(f"{side}: {seconds[side][-1]:.2f} s a step", flush=True)
    return seconds


def growth(rounds: int) -> list[dict[str, float]]:
    """Seconds of forward and backward of a batch of gold completions, by their positions' legal moves."""
    clock = own_clock("cpu")
    model, tokenizer = load("nano")
    find, rows = ChessPoints(tokenizer), [row for row in shipped("train") if row["task"] == "policy"]
    results = []
    for low, high in zip(BUCKETS, [*BUCKETS[1:], BUCKETS[-1] + 8], strict=True):
        chosen = [row for row in rows if low <= len(row["legal_moves"]) < high][:BATCH]
        prompts, answers = ([tokenizer(row[key])["input_ids"] for row in chosen] for key in ("prompt", "target"))
        answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
        batch = padded(prompts, answers)
        points = []
        for row, ids in zip(chosen, answers, strict=True):
            plain = find(row, ids)
            points.append(Points.read({key: plain[key] for key in ("decisions", "determined")}))
        seconds = []
        for _ in range(rounds * 4 + 1):
            start = clock()
            gpt2, head = GPT2.sharing(model), model.get_output_embeddings()
            score_tree(gpt2, head, batch, points).objective.sum().backward()
            seconds.append(clock() - start)
        moves = statistics.mean(len(row["legal_moves"]) for row in chosen)
        results.append({"legal_moves": moves, "seconds_a_row": statistics.median(seconds[1:]) / len(chosen)})
        print(f"{moves:.1f} legal moves: {1000 * results[-1]['seconds_a_row']:.1f} ms a row", flush=True)
    return results


def measure_exact(arguments: argparse.Namespace) -> dict[str, Any]:
    prompts = arguments.prompts or 48
    seconds, curve = sampled_and_exact(prompts, arguments.rounds), growth(arguments.rounds)
    logs = [[math.log(row[key]) for row in curve] for key in ("legal_moves", "seconds_a_row")]
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "prompts": prompts,
        "rounds": arguments.rounds,
        "seconds_per_step": middle,
        "sampled_over_exact": middle["sampled"] / middle["exact"],
        "growth": curve,
        "exponent": float(np.polyfit(*logs, 1)[0]),
        **machine("cpu"),
        "busy_processes": busy(),
        "clock": own_clock("cpu").__name__,
    }


MEASURES = {
    "scoring": measure_scoring,
    "rollouts": measure_rollouts,
    "learning": measure_learning,
    "step": measure_step,
    "exact": measure_exact,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(MEASURES)}; default: all")
    parser.add_argument("--model", type=Path, default=NANO_FOLDER, help="learning takes a random one by default")
    parser.add_argument("--prompts", type=int, help="default: each measure's own")
    parser.add_argument("--samples", type=int, nargs="+", help="of a prompt; default: each measure's own")
    parser.add_argument("--rows", type=int, default=6000, help="of a task, to be scored")
    parser.add_argument("--repeats", type=int, default=5, help="of scoring, rollouts, learning")
    parser.add_argument("--rounds", type=int, default=3, help="of step and exact")
    parser.add_argument("--bf16", action="store_true", help="rollouts and learning under bf16 autocast, all sides")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder, or of one measure a file")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.what) - set(MEASURES)):
        parser.error(f"nothing measures {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    logging.disable_progress_bar()
    for name in arguments.what or MEASURES:
        report = MEASURES[name](arguments)
        print(json.dumps(report))
        write_report(arguments.output if arguments.output.suffix else arguments.output / f"{name}.json", report)


if __name__ == "__main__":
    main()
