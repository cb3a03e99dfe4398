"""Health of a run: green, yellow and red bands for its metrics, and events where one changes.

A band is a pair (yellow, red). With yellow < red, larger is worse: below yellow is green, from red on is red. With
yellow > red, smaller is worse. A NaN is red. Names may hold shell wildcards: `*/parsed` judges each task's own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.utils import logging

from rookworld_trl.files import append_line
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin

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
class Health(Plugin):
    """Judges every training log, appends changes of level to `output_dir`/health.jsonl, and says so in one line.

    A level changes when `health_patience` logs in a row lie beyond it, and then only as far as the mildest of them:
    single batches are noisy. A NaN changes it at once. What turns red is told.

    Attributes:
        bands: by metric name or pattern; the first pattern that matches judges.
        levels: the present level of each judged metric, green to begin with.
        recent: the last judgements of each, as many as patience asks for.

    Raises:
        ValueError: a band that is none.
    """

    NAME = "health"
    REMEMBERED = ("levels", "recent")

    health_bands: dict[str, Any] | None = option(
        None,
        "Changes to the health bands, by metric or pattern: a pair [yellow, red], or null for no band; yellow above "
        "red means that smaller is worse.",
    )
    health_patience: int = option(3, "Logs in a row that must agree before a metric changes its colour.", least=1)
    levels: dict[str, str] = field(default_factory=dict, init=False)
    recent: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        changes = self.health_bands or {}
        for name, band in changes.items():
            pair = isinstance(band, list | tuple) and len(band) == 2 and all(isinstance(x, int | float) for x in band)
            if band is not None and not (pair and band[0] != band[1]):
                raise ValueError(
                    f"`health_bands[{name}]` is {band!r}: a band is a pair of two different numbers. Write [yellow, "
                    "red], or null for no band."
                )
        merged = {**changes, **{name: band for name, band in DEFAULT_BANDS.items() if name not in changes}}
        self.bands = {name: (float(band[0]), float(band[1])) for name, band in merged.items() if band is not None}

    @property
    def on(self) -> bool:
        return bool(self.bands)

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
            times = self.health_patience if math.isnan(value) else 1
            self.recent[name] = [*self.recent.get(name, []), *[now] * times][-self.health_patience :]
            # The level nearest to the one before among the recent, if there are enough and all lie on one side of it.
            recent, present = sorted(map(LEVELS.index, self.recent[name])), LEVELS.index(before)
            if len(recent) == self.health_patience:
                present = recent[0] if recent[0] > present else min(present, recent[-1])
            now = self.levels[name] = LEVELS[present]
            if now != before:
                events.append({"step": step, "metric": name, "value": value, "from": before, "to": now})
        return events

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:  # evaluation, or the summary at the end
            return
        events = self.observe(state.global_step, logs)
        if not events or not state.is_world_process_zero:
            return
        cells = (
            f"{e['metric']} {e['value']:.3g}{'' if e['to'] == self.level else ' ' + e['to']} (was {e['from']})"
            for e in events
        )
        logger.warning(f"step {state.global_step} health {self.level}: {', '.join(cells)}")
        red = {event["metric"]: event["value"] for event in events if event["to"] == RED}
        if red:
            self.trainer.tell({"event": "red", "step": state.global_step, "metrics": red})
        # JSON has no NaN: its name stands in a string.
        rows = [{**e, "value": e["value"] if math.isfinite(e["value"]) else str(e["value"])} for e in events]
        try:
            append_line(Path(args.output_dir, EVENTS_FILE), "\n".join(map(json.dumps, rows)))
        except OSError as error:  # a full disk must not cost the run
            logger.warning(f"events of step {state.global_step} are in no file: {error}")
