"""What a step asks of the hardware: seconds of its parts, and memory."""

import time
from dataclasses import dataclass
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from rookworld_trl.memory import Memory
from rookworld_trl.modeling.gpt2 import compiled_graphs
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin, Row


@dataclass
class Throughput(Plugin):
    """Reports memory and seconds of each optimizer step.

    Attributes:
        seconds: of the present step's phases.
    """

    NAME = "throughput"

    throughput: bool = option(True, "Log memory and the seconds of a step's parts, as `perf/...`.")

    @property
    def on(self) -> bool:
        return self.throughput

    def attach(self, trainer: Any) -> None:
        self.trainer, self.started, self.memory, self.seconds = trainer, 0.0, Memory(), dict[str, float]()

    def ended(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if phase == "sampling":
            self.memory.ended("rollout")

    def sampled(self, rows: list[Row], batch: Row) -> None:
        self.memory.ended("scoring")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.graphs = compiled_graphs() if args.torch_compile else 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.seconds = time.perf_counter(), {}
        self.memory.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = time.perf_counter() - self.started
        parts = {name: self.seconds.get(name, 0.0) for name in ("sampling", "rewards")}
        for name, value in {**parts, "learning": seconds - sum(parts.values())}.items():
            self.trainer.record(f"perf/seconds_{name}", value)
        if args.torch_compile:  # padding keeps their number small
            self.trainer.record("perf/compiled_graphs", compiled_graphs() - self.graphs)
        for name, value in self.memory.step().items():
            self.trainer.record(f"perf/memory_{name}", value)
