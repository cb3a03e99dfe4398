"""What the benchmarks share: the shipped model and rewards, clocks, a timed training, and the form of a report."""

import contextlib
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.utils import logging

from rookworld_trl.chess import rewards
from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.mixing import mix
from rookworld_trl.files import write_atomically
from rookworld_trl.plugins import split
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
shipped = functools.cache(load_shipped)  # which expands 20,000 rows by python-chess
REWARDS = [rewards.policy_reward_continuous, rewards.environment_reward_continuous]

# Fields of TRL's GRPOConfig with which its trainer and ours do the same work in float32 on a CPU. Dropout is off, or
# stock would do other work; sampling is not cut, which the log-probs would not see.
ALIKE: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "top_p": 1.0,
    "top_k": 0,
    "disable_dropout": True,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "shuffle_dataset": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def best_device() -> str:
    """The GPU where there is one; asked when it is needed, since processes that have asked cannot be forked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict[str, Any]:
    """What figures depend on, for a report."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {"machine": name, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def busy() -> float:
    """How many processes wanted a core, on average over five minutes: those beside this one slow its figures."""
    return round(os.getloadavg()[1], 1)


def write_report(path: Path, report: Mapping[str, Any] | list[Any]) -> None:
    """Write a report as JSON, whole or not at all; numbers with nine digits, as a sum in another order is the same."""
    write_atomically(path, json.dumps(rounded(report), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same with nine digits of each number that is no integer."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def random_model(layers: int, width: int, heads: int, vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"vocab_size": vocab_size, "n_positions": 256, "n_embd": width, "n_layer": layers, "n_head": heads}
    return GPT2LMHeadModel(GPT2Config(**shape, **ids)).eval()


def padded(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Token ids and masks as TRL's trainer holds them: prompts (B, P) padded on the left, completions (B, C) right."""
    batch = {}
    for name, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        for what, values in (("ids", rows), ("mask", [[1] * len(ids) for ids in rows])):
            tensors = [torch.tensor(each) for each in values]
            batch[f"{name}_{what}"] = pad_sequence(tensors, batch_first=True, padding_side=side)
    return batch


def wait(device: str) -> None:
    """Until the device has done what it was given; only then does a clock say how long that took."""
    if device == "cuda":
        torch.cuda.synchronize()


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


def own_clock(device: str) -> Callable[[], float]:
    """The process's own seconds where one thread of a CPU does all the work: others on the machine hardly count in
    them. Elsewhere the wall's."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def medians(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each side, run in turn after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats + 1):
        for name, side in sides.items():
            start = clock()
            side()
            wait(device)
            if round_:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class StepClock(TrainerCallback):
    """Wall seconds of each optimizer step; a step's sampling happens inside it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class Phases:
    """Seconds of each phase of a step, those of phases inside it left out."""

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = ["other"]
        self._since = clock()

    def _account(self) -> None:
        wait(self.device)
        now = self.clock()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._account()
        self._stack.append(name)
        try:
            yield
        finally:
            self._account()
            self._stack.pop()

    def wrap(self, owner: Any, method: str, name: Callable[[], str]) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name()):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        self._account()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class StepPhases(TrainerCallback):
    """Seconds of each step's phases."""

    def __init__(self, phases: Phases) -> None:
        self.phases, self.steps = phases, list[dict[str, float]]()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.phases.wrap(kwargs["optimizer"], "step", lambda: "optimizer")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.phases.take()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.phases.take())


def timed_training(
    model: Any,
    tokenizer: Any,
    *,
    prompts: int,
    samples: int,
    tokens: int,
    steps: int,
    device: str,
    micro_batch: int | None = None,
    find_points: Any = None,
    clock: Callable[[], float] = time.perf_counter,
    **settings: Any,
) -> dict[str, Any]:
    """Train on the shipped prompts, a quarter of them `A:`, one update a batch; a first step warms up and is not timed.

    Args:
        model: or its name, by which TRL loads it.
        prompts, samples: prompts a batch and completions of each.
        tokens: of a completion, at most.
        steps: timed ones.
        micro_batch: rows of a forward and backward pass; None: all.
        find_points: for the exact objective.
        clock: what counts the seconds.
        settings: more of the trainer's and of plug-ins.

    Returns:
        Medians of the timed steps (seconds, phases, utilisation), the most memory taken so far, the gates' measurements
        and every step's line of the log, under `log`.
    """
    logging.disable_progress_bar()
    rows = prompts * samples
    micro_batch = min(micro_batch or rows, rows)
    with tempfile.TemporaryDirectory() as folder:
        others, plugins = split(settings)
        args = RookWorldGRPOConfig(
            output_dir=folder,
            use_cpu=device == "cpu",
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=rows // micro_batch,
            num_generations=samples,
            max_completion_length=tokens,
            learning_rate=1e-6,
            max_steps=steps + 1,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **others,
        )
        plan = mix(shipped("train"), 0.25, prompts_per_batch=prompts, batches=steps + 1, seed=0)
        more: Any = {"find_points": find_points, "plugins": plugins}
        trainer = RookWorldGRPOTrainer(model, REWARDS, args, plan, processing_class=tokenizer, **more)
        phases = Phases(device, clock)
        phases.wrap(trainer, "_generate_single_turn", lambda: "sampling")
        phases.wrap(trainer, "_calculate_rewards", lambda: "rewards")
        name = "_get_per_token_logps_and_entropies"
        phases.wrap(trainer, name, lambda: "forward" if torch.is_grad_enabled() else "reference")
        phases.wrap(trainer, "_compute_loss", lambda: "loss")
        phases.wrap(trainer.accelerator, "backward", lambda: "backward")
        watch = StepPhases(phases)
        trainer.add_callback(watch)
        trainer.train()
        log = [row for row in trainer.state.log_history if "loss" in row]
        models = [each for each in (trainer.model, trainer.ref_model) if each is not None]
        trainer.close()
    timed = watch.steps[1:]
    names = sorted({name for step in timed for name in step})

    return {
        "parameters": models[0].num_parameters(),
        "devices": [", ".join(sorted({str(weight.device) for weight in each.parameters()})) for each in models],
        "seconds_per_step": round(statistics.median(sum(step.values()) for step in timed), 4),
        "phases": {name: round(statistics.median(step.get(name, 0.0) for step in timed), 4) for name in names},
        "completion_tokens": round(statistics.mean(row["completions/mean_length"] for row in log[1:]), 1),
        "memory_gb": round(log[-1]["perf/memory_gb"], 3),
        "gates": {key.removeprefix("gates/"): value for key, value in log[0].items() if key.startswith("gates/")},
        "log": log,
    }
