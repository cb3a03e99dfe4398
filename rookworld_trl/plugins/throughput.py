"""What a step asks of the hardware: seconds, memory and, for GPT-2, operations counted by formula.

Only matrix products that the method needs are counted (2 per multiply-add, causal attention at half its square, the
head at completion tokens alone), so the utilisation is a lower bound and cannot exceed 100 % of a true peak. Counted:
sampling (a group's prompt once), the reference's pass, and the policy's pass with a backward pass of twice its size
(as in PaLM, arXiv 2204.02311, appendix B); where rows share prefixes, each prefix once. Not counted: gates, probes,
evaluation, recomputation.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.memory import Memory
from rookworld_trl.settings.parser import option
from rookworld_trl.training.placement import compiled_graphs
from rookworld_trl.training.plugin import SIDES, Plugin, Row

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


def peak_of(tflops: float | None, on_cpu: bool, mixed: bool) -> float | None:
    """Peak of the device that a run uses: what the settings say, or that of a known GPU."""
    if tflops:
        return tflops * 1e12
    return None if on_cpu or not torch.cuda.is_available() else peak_flops(torch.cuda.get_device_name(), mixed)


def forward_flops(config: Any, start: Any, end: Any, head: Any) -> Any:
    """Forward pass of GPT-2 over positions `start` to `end` (exclusive) of one row, whose earlier ones are cached.

    Of several rows at once when `start`, `end` and `head` are arrays of whole numbers.

    Args:
        config: `GPT2Config`: d = n_embd, inner = n_inner or 4 d, L = n_layer, V = vocab_size.
        head: positions whose logits are computed.

    Returns:
        L * (n * (8 d^2 + 4 d inner) + 4 d * (keys attended to, summed over the n positions)) + head * 2 d V.
    """
    d, count = config.n_embd, end - start
    inner = config.n_inner or 4 * d
    keys = (end * (end + 1) - start * (start + 1)) // 2
    return config.n_layer * (count * (8 * d * d + 4 * d * inner) + 4 * d * keys) + head * 2 * d * config.vocab_size


def sampling_flops(config: Any, prompts: Sequence[int], completions: Sequence[int], num_generations: int) -> int:
    """Sampling rows of these lengths, in tokens: each completion with a cache, each prompt once for its group."""
    decoded = sum(forward_flops(config, p, p + c - 1, c) for p, c in zip(prompts, completions, strict=True) if c)
    return decoded + sum(forward_flops(config, 0, p, 0) for p in prompts[::num_generations])


def scoring_flops(config: Any, prompts: Sequence[int], completions: Sequence[int]) -> int:
    """One forward pass over rows of these lengths, in tokens, for the log-probs of their completions."""
    return sum(forward_flops(config, 0, p + c, c) for p, c in zip(prompts, completions, strict=True))


def shared_scoring_flops(config: Any, ids: np.ndarray, mask: np.ndarray, completions: np.ndarray) -> int:
    """As `scoring_flops`, when a prefix that several rows begin with is computed once.

    Args:
        ids: (N, T) tokens of prompts and completions.
        mask: (N, T) bool, which of them are there.
        completions: (N,) tokens of each row's completion.
    """
    order = np.argsort(~mask, axis=1, kind="stable")
    lengths = mask.sum(1)
    tokens = np.where(np.arange(ids.shape[1]) < lengths[:, None], np.take_along_axis(ids, order, 1), -1)
    keys = [row.tobytes() for row in tokens]
    ranked = np.array(sorted(range(len(keys)), key=keys.__getitem__))  # rows with a common prefix stand together
    tokens, lengths, completions = tokens[ranked], lengths[ranked], completions[ranked]
    differs = np.pad(tokens[1:] != tokens[:-1], ((1, 0), (0, 1)), constant_values=True)
    starts = np.minimum(differs.argmax(1), lengths)
    return int(forward_flops(config, starts, lengths, np.minimum(completions, lengths - starts)).sum())


@dataclass
class Throughput(Plugin):
    """Reports memory, seconds and, for GPT-2, operations a second and their share of the peak, for each optimizer step.

    Attributes:
        counts: the model's operations can be counted.
        flops: of the present step.
        seconds: of the present step's phases.
    """

    NAME = "throughput"

    throughput: bool = option(
        True, "Log memory, the seconds of a step's parts, and operations a second, as `perf/...`."
    )
    peak_tflops: float | None = option(
        None, "Peak of one device, for MFU; by default known for common GPUs only.", above=0
    )

    @property
    def on(self) -> bool:
        return self.throughput

    def attach(self, trainer: Any) -> None:
        self.trainer, self.config, self.shared = trainer, trainer.model.config, trainer.scorer.shared
        self.counts = self.config.model_type == "gpt2"
        self.peak = peak_of(self.peak_tflops, trainer.args.use_cpu, trainer.accelerator.mixed_precision != "no")
        self.flops, self.started = 0, 0.0
        self.memory, self.seconds = Memory(), dict[str, float]()

    def ended(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if phase == "sampling":
            self.memory.ended("rollout")

    def sampled(self, rows: list[Row], batch: Row) -> None:
        """Count a sampled batch, and the reference's pass over it if it had one.

        Of rows whose completions were drawn along a draft, what they share may have been computed once, and counts
        once.
        """
        self.memory.ended("scoring")
        if not self.counts:
            return
        drafted = self.trainer.sampler.drafted()
        alone = batch
        if drafted is not None:
            along = torch.tensor(drafted, device=batch["prompt_ids"].device)
            alone = {key: batch[key][~along] for key in SIDES}
            # What a completion ends with is drawn, and need not be passed.
            self.flops += self._shared({key: batch[key][along] for key in SIDES}, drawn_last=True)
        self.flops += sampling_flops(self.config, *_lengths(alone), self.trainer.num_generations)
        if "ref_per_token_logps" in batch:
            self.flops += self._scoring(batch)

    def trained(self, batch: Row, trees: Sequence[tuple[int, int]] | None = None) -> None:
        """Count a micro-batch's forward and backward pass."""
        if self.counts:
            flops = self._scoring(batch) if trees is None else scoring_flops(self.config, *zip(*trees, strict=True))
            self.flops += 3 * flops

    def _scoring(self, batch: dict[str, torch.Tensor]) -> int:
        if not self.shared:
            return scoring_flops(self.config, *_lengths(batch))
        return self._shared(batch)

    def _shared(self, batch: dict[str, torch.Tensor], drawn_last: bool = False) -> int:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).cpu().numpy()
        completion = batch["completion_mask"].bool().cpu().numpy().copy()
        if drawn_last:
            last = completion.shape[1] - 1 - completion[:, ::-1].argmax(1)
            completion[np.arange(len(completion)), last] = False
        mask = np.concatenate([batch["prompt_mask"].bool().cpu().numpy(), completion], axis=1)
        return shared_scoring_flops(self.config, ids, mask, completion.sum(1))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.graphs = compiled_graphs() if args.torch_compile else 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.flops, self.started, self.seconds = 0, time.perf_counter(), {}
        self.memory.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = time.perf_counter() - self.started
        if self.counts:
            self.trainer.record("perf/tflops_per_second", self.flops / seconds / 1e12)
            if self.peak:
                self.trainer.record("perf/mfu", self.flops / seconds / self.peak)
        parts = {name: self.seconds.get(name, 0.0) for name in ("sampling", "rewards")}
        for name, value in {**parts, "learning": seconds - sum(parts.values())}.items():
            self.trainer.record(f"perf/seconds_{name}", value)
        if args.torch_compile:  # padding keeps their number small
            self.trainer.record("perf/compiled_graphs", compiled_graphs() - self.graphs)
        for name, value in self.memory.step().items():
            self.trainer.record(f"perf/memory_{name}", value)


def _lengths(batch: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    return batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
