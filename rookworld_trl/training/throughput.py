"""Floating-point operations of a GRPO step with GPT-2, counted by formula, and what they say about the hardware.

Only matrix products that the method needs are counted (2 per multiply-add, causal attention at half its square, the
head at completion tokens alone), so the utilisation is a lower bound and cannot exceed 100 % of a true peak. Counted:
sampling (a group's prompt once), the reference's pass, and the policy's pass with a backward pass of twice its size
(as in PaLM, arXiv 2204.02311, appendix B); where rows share prefixes, each prefix once. Not counted: gates, probes,
evaluation, recomputation.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Dense peaks from the makers' data sheets, in operations a second: (float32, bf16 with float32 accumulation).
PEAKS = {
    "H200": (67e12, 989e12),
    "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
    "RTX 4090": (82.6e12, 165.2e12),
    "RTX 3090": (35.6e12, 71e12),
}


def peak_flops(device_name: str, mixed: bool) -> float | None:
    """Peak of a known GPU for float32 or 16-bit autocast (`mixed`); None for others, CPUs among them."""
    return next((peaks[mixed] for name, peaks in PEAKS.items() if name in device_name), None)


def forward_flops(config: Any, start: int, end: int, head: int) -> int:
    """Forward pass of GPT-2 over positions `start` to `end` (exclusive) of one row, whose earlier ones are cached.

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


def shared_scoring_flops(config: Any, rows: Sequence[tuple[list[int], list[int]]]) -> int:
    """As `scoring_flops`, when a prefix that several rows (prompt and completion ids) begin with is computed once."""
    total, previous = 0, [-1]
    for prompt, completion in sorted(rows, key=lambda row: row[0] + row[1]):
        ids = prompt + completion
        same = next((i for i, (a, b) in enumerate(zip(ids, previous, strict=False)) if a != b), None)
        start = min(len(ids), len(previous)) if same is None else same
        total += forward_flops(config, start, len(ids), min(len(completion), len(ids) - start))
        previous = ids
    return total


class Throughput(TrainerCallback):
    """Reports memory and, for GPT-2, operations a second and their share of the peak, for each optimizer step.

    Args:
        config: the model's configuration; only GPT-2's operations are counted.
        record: takes a metric's name and value.
        peak: operations a second that the device can do; None: report no share.
        shared: rows are scored over their distinct prefixes, not one by one.
    """

    def __init__(self, config: Any, record: Callable[[str, float], None], peak: float | None, shared: bool = False):
        self.config, self.record, self.peak, self.shared = config, record, peak, shared
        self.counts = config.model_type == "gpt2"
        self.flops = 0
        self.started = 0.0

    def sampled(
        self, batch: dict[str, torch.Tensor], num_generations: int, drafted: Sequence[bool] | None = None
    ) -> None:
        """Count a sampled batch, and the reference's pass over it if it had one.

        Args:
            drafted: rows whose completions were drawn along a draft; of these, what samples share may have been
                computed once, and counts once.
        """
        if self.counts:
            alone = batch
            if drafted is not None:
                along = torch.tensor(drafted, device=batch["prompt_ids"].device)
                alone = {key: batch[key][~along] for key in _SIDES}
                rows = _rows({key: batch[key][along] for key in _SIDES})
                # What a completion ends with is drawn, and need not be passed.
                self.flops += shared_scoring_flops(self.config, [(prompt, ids[:-1]) for prompt, ids in rows])
            self.flops += sampling_flops(self.config, *_lengths(alone), num_generations)
            if "ref_per_token_logps" in batch:
                self.flops += self._scoring(batch)

    def trained(self, batch: dict[str, torch.Tensor]) -> None:
        """Count a micro-batch's forward and backward pass."""
        if self.counts:
            self.flops += 3 * self._scoring(batch)

    def _scoring(self, batch: dict[str, torch.Tensor]) -> int:
        if not self.shared:
            return scoring_flops(self.config, *_lengths(batch))
        return shared_scoring_flops(self.config, _rows(batch))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.flops, self.started = 0, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = time.perf_counter() - self.started
        if self.counts:
            self.record("perf/tflops_per_second", self.flops / seconds / 1e12)
            if self.peak:
                self.record("perf/mfu", self.flops / seconds / self.peak)
        self.record("perf/memory_gb", memory_gb())


_SIDES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def _lengths(batch: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    return batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()


def _rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    return list(zip(_tokens(batch, "prompt"), _tokens(batch, "completion"), strict=True))


def _tokens(batch: dict[str, torch.Tensor], side: str) -> list[list[int]]:
    ids, mask = batch[f"{side}_ids"].cpu(), batch[f"{side}_mask"].bool().cpu()
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def memory_gb() -> float:
    """Most memory used so far, GB: of the GPU by tensors, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
