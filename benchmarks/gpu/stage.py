"""What a stage of `make gpu` is given, and where it puts what it found."""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import ROOT, timed_training
from benchmarks.fresh import write_fresh
from rookworld_trl.modeling.loading import NANO_FOLDER, load, load_tokenizer
from rookworld_trl.training.gates import Bounds

T = TypeVar("T")
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2}  # with GPT-2's 50,257 tokens, as at full size


class NotPossibleError(Exception):
    """This device, or what is installed beside it, cannot do what the stage asks; the message says why."""


@dataclass
class Stage:
    """One stage at work.

    Attributes:
        name: of the stage.
        device: cuda or cpu.
        tiny: sizes that a CPU does in seconds; the code is the same.
        root: folder of all stages' models and runs; a stage writes to `folder`, which is empty when it starts.
        figures: what was measured, by name.
        checks: what must hold, as measured, bound and held.
    """

    name: str
    device: str
    tiny: bool
    root: Path
    minutes: float = 5.0
    figures: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def pick(self, full: T, tiny: T) -> T:
        """The size to work at."""
        return tiny if self.tiny else full

    def check(self, what: str, measured: float | bool, bound: float | None = None) -> None:
        """Note that `measured` must not exceed `bound`, or, without a bound, must be true. NaN never holds."""
        held = bool(measured) if bound is None else measured <= bound
        self.checks[what] = {"measured": measured, "bound": bound, "held": held}
        print(f"check {what}: {measured}{'' if bound is None else f', bound {bound:.3g}'}, {held}", flush=True)

    def needs(self, possible: bool, why: str) -> None:
        """Raises:
        NotPossibleError: unless `possible`.
        """
        if not possible:
            raise NotPossibleError(why)

    def fresh(self) -> Path:
        """Folder of a random GPT-2 of 124,439,808 parameters (or a tiny one) and GPT-2's tokenizer; made once."""
        folder = self.root / self.pick("random-124m", "random-tiny")
        if not folder.exists():
            staged = folder.with_name(f".{folder.name}-{os.getpid()}")
            write_fresh(staged, **self.pick({}, TINY))
            staged.rename(folder)
        return folder

    def tf32(self, on: bool) -> None:
        """TF32 for what stays float32 under bf16 autocast, as a run with `bf16` has it; off: float32 itself."""
        torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"

    def load(self, folder: Path | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
        """Model on the device, and tokenizer; of `fresh` by default. Memory is counted from here on."""
        model, tokenizer = load(folder or self.fresh())
        self.count_memory()
        return model.to(self.device), tokenizer

    def count_memory(self) -> None:
        """Forget the most memory used so far, on a GPU."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self, work: Callable[[], object]) -> float | None:
        """Most memory that tensors take while `work` runs, GB; None without a GPU."""
        self.count_memory()
        work()
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def train(
        self, what: str, *, bf16: bool, nano: bool = False, named: Path | None = None, **settings: Any
    ) -> dict[str, Any]:
        """A few timed steps of GRPO, noted as a figure; the gates must be within their bounds.

        Args:
            what: name of the figure.
            nano: the shipped model instead of `fresh`, which is random and so writes every completion to its end.
            named: a folder in place of both, whose name is handed over, so that TRL loads it.
            settings: of `timed_training`, in place of 8 prompts of 8 samples of 144 tokens and 3 steps.
        """
        sizes = {"prompts": 8, "samples": 8, "tokens": 144, "steps": 3, "micro_batch": 32}
        sizes |= settings
        if self.tiny:
            sizes |= {"prompts": 4, "samples": 2, "tokens": 8, "steps": 1, "micro_batch": 4}
        model: Any
        if named:
            model, tokenizer = str(named), load_tokenizer(named)
            self.count_memory()
        else:
            model, tokenizer = self.load(NANO_FOLDER if nano else None)
        found = timed_training(model, tokenizer, device=self.device, bf16=bf16, **sizes)
        bounds = Bounds.for_precision(mixed=bf16)
        if self.cuda:  # float32 before bf16: a process that has TF32 on keeps it
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            self.check(f"{what}: TF32 is on under bf16 and off in float32", tf32 == bf16)
        limits = {"padding": bounds.logp, "reference": bounds.kl, "sampled_ids": 0.0, "sampler": bounds.logp}
        for gate, limit in limits.items():
            self.check(f"{what}: gate {gate}", found["gates"].get(gate, float("nan")), limit)
        log = found.pop("log")
        if "perf/compiled_graphs" in log[-1]:
            found["graphs"] = log[-1]["perf/compiled_graphs"]
        found["first_step"] = {name: log[0][name] for name in ("loss", "grad_norm", "kl", "reward", "step_time")}
        self.figures[what] = found
        return found

    def recipe(self, settings: dict[str, Any], *command: str) -> list[dict[str, Any]]:
        """Run `recipes/grpo.py` as a program, by a launcher's command; the lines of its metrics.

        Raises:
            RuntimeError: it failed; its output is in the stage's log.
        """
        settings = {"output_dir": self.folder / "run", **settings}
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, *command, *words], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
        lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "kl" in row]


def short(found: dict[str, Any]) -> str:
    """A training's figures in a table's cell."""
    parts = [f"{found['seconds_per_step']:.3g} s a step", f"{found['memory_gb']:.1f} GB"]
    return ", ".join(parts)


# Dense peaks from the makers' data sheets, in operations a second: (float32, bf16 with float32 accumulation), by the
# whole name that the driver gives: cards of one family differ (PCIe, NVL, laptops), and slices of a card are no card.
PEAKS = {
    r"NVIDIA H200": (67e12, 989e12),
    r"NVIDIA H100 80GB HBM3": (67e12, 989e12),
    r"NVIDIA H100 PCIe": (51e12, 756e12),
    r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": (19.5e12, 312e12),
    r"NVIDIA GeForce RTX 4090": (82.6e12, 165.2e12),
    r"NVIDIA GeForce RTX 3090": (35.6e12, 71e12),
}


def peak_flops(device_name: str, mixed: bool) -> float | None:
    """Peak of a known GPU for float32 or 16-bit autocast (`mixed`); None for others, CPUs among them."""
    return next((peaks[mixed] for name, peaks in PEAKS.items() if re.fullmatch(name, device_name)), None)
