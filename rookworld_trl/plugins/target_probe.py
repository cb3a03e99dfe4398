"""The log-prob of right completions on fixed rows tells learning from luck: rewards move with the prompts drawn."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rookworld_trl.modeling.completions import target_logps
from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin
from rookworld_trl.training.sampler import TARGET_COLUMN


@dataclass
class TargetProbe(Plugin):
    """Follows the truth's log-prob on rows spread evenly over the data: its gain over the run's start, in nats.

    Rows longer than the model's context are left out; there are none without the column `target`, or from a
    stream. Prompt and completion are tokenised apart, as sampling meets them.

    Attributes:
        pairs: token ids of prompts and of right completions, the end token included.
        before: mean log-prob at the first start, nats a completion; a resumed run compares with it, too.
    """

    NAME = "target_probe"
    REMEMBERED = ("before",)

    target_rows: int = option(32, "Rows whose truth's log-prob is followed; 0: none.", least=0)
    target_every: int = option(10, "Optimizer steps between two looks at it.", least=1)
    before: float | None = field(default=None, init=False)

    @property
    def on(self) -> bool:
        return self.target_rows > 0

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        dataset, tokenizer = trainer.train_dataset, trainer.processing_class
        known = TARGET_COLUMN in (getattr(dataset, "column_names", None) or []) and hasattr(dataset, "__len__")
        count = min(self.target_rows, len(dataset)) if known else 0
        picked = [dataset[i * len(dataset) // count] for i in range(count)]
        pairs = [
            (
                tokenizer(text=row["prompt"])["input_ids"],
                [*tokenizer(text=row[TARGET_COLUMN], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
            )
            for row in picked
            if isinstance(row["prompt"], str) and row[TARGET_COLUMN]
        ]
        context = getattr(trainer.model.config, "max_position_embeddings", None) or float("inf")
        self.pairs = [pair for pair in pairs if sum(map(len, pair)) <= context]

    def measure(self, model: nn.Module) -> float:
        """Mean log-prob, nats a completion."""
        return target_logps(model, self.pairs, self.trainer.processing_class.pad_token_id).mean().item()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.pairs and self.before is None and model is not None:
            self.before = self.measure(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.before is not None and model is not None and state.global_step % self.target_every == 0:
            now = self.measure(model)
            self.trainer.record("truth/logp", now)
            self.trainer.record("truth/logp_gain", now - self.before)
