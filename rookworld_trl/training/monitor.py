"""Health of a run: green, yellow and red bands for its metrics, events where one changes, and the truth's log-prob.

A band is a pair (yellow, red). With yellow < red, larger is worse: below yellow is green, from red on is red. With
yellow > red, smaller is worse. A NaN is red. Names may hold shell wildcards: `*/parsed` judges each task's own.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from rookworld_trl.checkpointing.state import Remembers
from rookworld_trl.files import append_line

logger = logging.get_logger(__name__)

EVENTS_FILE = "health.jsonl"
GREEN, YELLOW, RED = LEVELS = ("green", "yellow", "red")

DEFAULT_BANDS: dict[str, tuple[float, float]] = {
    "kl": (0.1, 0.5),  # nats a token
    "kl/sequence_p95": (30.0, 45.0),  # nats a completion; at 50 the run stops
    "loss": (2.0, 10.0),  # advantages are scaled to a deviation of 1, so a healthy loss is a fraction of that
    "reward": (0.0, -0.2),  # below 0, most completions are unusable
    "*/parsed": (0.9, 0.8),  # structure validity, per task
    "*/best_legal": (0.7, 0.5),  # of the moves chosen; the weakest start here has 0.8
    "exact/decided/*": (0.2, 0.0),  # share of completions that reach a decision; of none of them is anything learned
    "entropy": (0.05, 0.005),  # nats a token; below, all samples of a group are alike
    "groups/informative": (0.3, 0.1),  # share of groups whose rewards differ
    "clip_ratio/region_mean": (0.1, 0.3),
    "grad_norm": (10.0, 100.0),
    "sampling/sampling_logp_difference/mean": (0.03, 0.1),  # nats; red: the gate's bound. A sampler with old weights
}


def level_of(value: float, yellow: float, red: float) -> str:
    """The band of one value; see the module."""
    if math.isnan(value):
        return RED
    sign = 1 if yellow < red else -1
    if sign * value >= sign * red:
        return RED
    return YELLOW if sign * value >= sign * yellow else GREEN


@dataclass
class HealthMonitor(Remembers, TrainerCallback):
    """Judges every training log, appends changes of level to `folder`/health.jsonl, and says so in one line.

    Attributes:
        bands: by metric name or pattern; the first pattern that matches judges.
        folder: where the events go; None: nowhere.
        tell: tells those who listen of metrics that turn red.
        patience: a level changes when so many logs in a row lie beyond it, and then only as far as the mildest of
            them: single batches are noisy. A NaN changes it at once.
        levels: the present level of each judged metric, green to begin with.
        recent: the last `patience` judgements of each.
    """

    REMEMBERED = ("levels", "recent")

    bands: Mapping[str, tuple[float, float]]
    folder: Path | None = None
    patience: int = 1
    levels: dict[str, str] = field(default_factory=dict)
    recent: dict[str, list[str]] = field(default_factory=dict)
    tell: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def level(self) -> str:
        """The worst level of all."""
        return max(self.levels.values(), key=LEVELS.index, default=GREEN)

    def observe(self, step: int, logs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Judge one log; return an event for each metric whose level changed."""
        events = []
        for name, value in logs.items():
            band = next((band for pattern, band in self.bands.items() if fnmatchcase(name, pattern)), None)
            if band is None or not isinstance(value, int | float):
                continue
            before, now = self.levels.get(name, GREEN), level_of(value, *band)
            times = self.patience if math.isnan(value) else 1
            self.recent[name] = [*self.recent.get(name, []), *[now] * times][-self.patience :]
            now = self._lasting(name, before)
            self.levels[name] = now
            if now != before:
                events.append({"step": step, "metric": name, "value": value, "from": before, "to": now})
        return events

    def _lasting(self, name: str, before: str) -> str:
        """The level nearest to `before` among the recent ones, if there are enough and all lie on one side of it."""
        recent = sorted(map(LEVELS.index, self.recent[name]))
        present = LEVELS.index(before)
        if len(recent) < self.patience:
            return before
        return LEVELS[recent[0] if recent[0] > present else min(present, recent[-1])]

    def line(self, step: int, logs: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> str:
        """What changed, and what else is not green: `step 12 health yellow: kl 0.2 (was green), entropy 0.22`."""
        was = {event["metric"]: f" (was {event['from']})" for event in events}
        names = [*was, *(name for name, level in self.levels.items() if level != GREEN and name not in was)]
        cells = []
        for name in names:
            value, level = logs.get(name), self.levels[name]
            number = f" {value:.3g}" if isinstance(value, int | float) else ""
            cells.append(f"{name}{number}{'' if level == self.level else ' ' + level}{was.get(name, '')}")
        return f"step {step} health {self.level}" + (": " + ", ".join(cells) if cells else "")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:  # evaluation, or the summary at the end
            return
        events = self.observe(state.global_step, logs)
        if not events or not state.is_world_process_zero:
            return
        logger.warning(self.line(state.global_step, logs, events))
        red = {event["metric"]: event["value"] for event in events if event["to"] == RED}
        if red and self.tell is not None:
            self.tell({"event": "red", "step": state.global_step, "metrics": red})
        if self.folder is not None:
            # JSON has no NaN: its name stands in a string.
            rows = [{**e, "value": e["value"] if math.isfinite(e["value"]) else str(e["value"])} for e in events]
            try:
                append_line(self.folder / EVENTS_FILE, "\n".join(map(json.dumps, rows)))
            except OSError as error:  # a full disk must not cost the run
                logger.warning(f"events of step {state.global_step} are in no file: {error}")


def target_logps(
    model: nn.Module,
    rows: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-prob (N,), nats, of each row's second token list after its first, without gradients.

    Rows are padded on the right, where causal attention makes padding harmless, and taken in the order of their
    lengths, so that there is little of it. What comes before all targets of a batch doesn't go through the head.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: sum(map(len, rows[row])))
    totals = torch.zeros(len(rows), device=device)
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        lengths = [(len(rows[row][0]), sum(map(len, rows[row]))) for row in part]
        width = max(length for _, length in lengths)
        padded = [[*rows[row][0], *rows[row][1]] + [pad_token_id] * width for row in part]
        ids = torch.tensor([row[:width] for row in padded], device=device)
        place = torch.arange(width, device=device)
        begins, ends = torch.tensor(lengths, device=device)[:, :, None].unbind(1)
        target = ((begins <= place) & (place < ends))[:, 1:]
        keep = width - int(begins.min()) + 1  # the last positions, from the one that predicts the first target on
        with torch.no_grad():
            attention = (place < ends).long()
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        kept = logits.shape[1]  # fewer than `keep` where a target begins the row: nothing predicts its first token
        logps = torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, ids[:, -kept:, None])[..., 0]
        totals[torch.tensor(part, device=device)] = (logps * target[:, -kept:]).sum(dim=1)
    return totals


class TargetProbe(Remembers, TrainerCallback):
    """Follows the log-prob of known right completions on fixed rows: its gain over the run's start, in nats.

    It tells learning from luck: rewards move with the prompts drawn, these rows stay.

    Args:
        rows: token ids of prompts and of right completions, the end token included.
        pad_token_id: to fill rows up.
        record: takes a metric's name and value.
        every: optimizer steps between measurements.
    """

    REMEMBERED = ("before",)  # a resumed run compares with its first start

    def __init__(
        self,
        rows: Sequence[tuple[list[int], list[int]]],
        pad_token_id: int,
        record: Callable[[str, float], None],
        every: int,
    ):
        self.rows, self.pad_token_id, self.record, self.every = rows, pad_token_id, record, every
        self.before: float | None = None

    def measure(self, model: nn.Module) -> float:
        """Mean log-prob, nats a completion."""
        return target_logps(model, self.rows, self.pad_token_id).mean().item()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.rows and self.before is None and model is not None:
            self.before = self.measure(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.before is not None and model is not None and state.global_step % self.every == 0:
            now = self.measure(model)
            self.record("truth/logp", now)
            self.record("truth/logp_gain", now - self.before)


def target_rows(
    dataset: Any, tokenizer: Any, column: str, count: int, context: int | None
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and right completion (with eos) of `count` rows spread evenly over `dataset`.

    Prompt and completion are tokenised apart, as sampling meets them. Rows longer than the model's `context` are left
    out; there are none without such a column, or from a stream.
    """
    if count <= 0 or column not in (getattr(dataset, "column_names", None) or []) or not hasattr(dataset, "__len__"):
        return []
    count = min(count, len(dataset))
    picked = [dataset[i * len(dataset) // count] for i in range(count)]
    rows = [
        (
            tokenizer(text=row["prompt"])["input_ids"],
            [*tokenizer(text=row[column], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        for row in picked
        if isinstance(row["prompt"], str) and row[column]
    ]
    return [(prompt, truth) for prompt, truth in rows if context is None or len(prompt) + len(truth) <= context]


def target_probe(
    args: Any, dataset: Any, tokenizer: Any, model: Any, record: Callable[[str, float], None]
) -> TargetProbe:
    """The probe that a `RookWorldGRPOConfig` asks for; `model` is the policy's configuration."""
    context = getattr(model, "max_position_embeddings", None)
    rows = target_rows(dataset, tokenizer, args.target_column, args.target_rows, context)
    return TargetProbe(rows, tokenizer.pad_token_id, record, args.target_every)
