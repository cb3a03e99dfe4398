"""What a sampler drew, and from which distribution."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from rookworld_trl.modeling.hooks import without_adapters


@dataclass(frozen=True, slots=True)
class Drawn:
    """How one completion was drawn.

    Attributes:
        logps: of each token, in the distribution that it was drawn from, after temperature, truncation and penalties.
        whole: of each token at the same temperature over the whole vocabulary; None where logits are out of sight.
        temperature: that the sampler divided by; None where that is out of sight.
    """

    logps: list[float]
    whole: list[float] | None = None
    temperature: float | None = None


@dataclass(slots=True)
class Sampled:
    """What a sampler returned for one batch, in the batch's order.

    Attributes:
        prompt_ids, completion_ids: token ids, unpadded.
        drawn: how each row was drawn; None for rows not recorded.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    drawn: list[Drawn | None]


class _Tap:
    """A logits processor that changes nothing and keeps the log-prob of each token once it is known."""

    supports_continuous_batching = False  # which has rows of several lengths in one call; there it is left out

    def __init__(self, rows: int, temperature: float):
        self.rows, self.temperature = rows, temperature
        self._taken: list[torch.Tensor] = []
        self._table: torch.Tensor | None = None  # (rows, V) of the token that is drawn next

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids[: self.rows, -1])
        self._table = torch.log_softmax(scores[: self.rows].float() / self.temperature, dim=-1)
        return scores

    def _take(self, tokens: torch.Tensor) -> None:
        if self._table is not None:
            self._taken.append(self._table.gather(-1, tokens[:, None])[:, 0])

    def logps(self, completion_ids: list[list[int]]) -> list[list[float]]:
        """Log-probs of the recorded rows' tokens; called once, when the completions are known."""
        if self._table is None:
            return []
        ids, step = completion_ids[: self.rows], len(self._taken)
        last = [row[step] if step < len(row) else 0 for row in ids]
        self._take(torch.tensor(last, device=self._table.device))
        table = torch.stack(self._taken, dim=1).tolist()
        return [logps[: len(row)] for logps, row in zip(table, ids, strict=True)]


@contextmanager
def record_generate(model: nn.Module, rows: int = 4) -> Iterator[Callable[[list[list[int]]], list[Drawn]]]:
    """Record what `generate` of transformers draws from for its first `rows` rows, after its last logits processor.

    Settings need not be known: what a model's own `generation_config` slips in is seen too. Yields a function to be
    called after the block: `drawn(completion_ids)` gives one `Drawn` for each recorded row; none if `generate` was not
    called.
    """
    plain = without_adapters(getattr(model, "_orig_mod", model))  # below `torch.compile`
    build, outer = plain._get_logits_processor, vars(plain).get("_get_logits_processor")
    taps: list[tuple[_Tap, _Tap]] = []

    def tapped(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = build(*args, **kwargs)
        divisors = [each.temperature for each in processors if isinstance(each, TemperatureLogitsWarper)]
        whole, drawn = _Tap(rows, divisors[0] if divisors else 1.0), _Tap(rows, 1.0)
        taps.append((whole, drawn))
        return LogitsProcessorList([whole, *processors, drawn])

    def drawn(completion_ids: list[list[int]]) -> list[Drawn]:
        if not taps:
            return []
        whole, last = taps[0]
        rows_of = zip(last.logps(completion_ids), whole.logps(completion_ids), strict=True)
        return [Drawn(logps, over_all, whole.temperature) for logps, over_all in rows_of]

    plain._get_logits_processor = tapped
    try:
        yield drawn
    finally:
        if outer is None:
            del plain._get_logits_processor  # the class's own shows again
        else:
            plain._get_logits_processor = outer
