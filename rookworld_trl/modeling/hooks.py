"""What is hung into a model, with adapters or compiled too: forward hooks, what records and repairs sampling, and
position ids that follow the attention mask, so that left padding does not move learned positions.

`generate()` derives `position_ids` from the attention mask; a plain forward pass that is given only the mask does not:
GPT-2 then counts from the first column, padding included, and every row shorter than the longest of its batch is
scored at shifted positions. Nothing fails; log-probabilities, KL and gradients are merely wrong.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import LogitsProcessorList, TemperatureLogitsWarper


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook for the length of the block.

    What `torch.compile` has compiled does not look whether hooks were added since, so the model runs as it is written
    inside the block.
    """
    handle = module.register_forward_hook(hook)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


def without_adapters(model: Any) -> Any:
    """The model below peft's adapters; itself where there are none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def capture_hidden(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the last hidden states (B, S, H) of each forward pass of the backbone inside the block."""
    states: list[torch.Tensor] = []
    with hooked(without_adapters(model).base_model, lambda _, __, output: states.append(output.last_hidden_state)):
        yield states


@contextmanager
def at_temperatures(model: nn.Module, temperatures: torch.Tensor, temperature: float) -> Iterator[None]:
    """Let a model whose head divides logits by `temperature` score row r of a batch at `temperatures[r]` instead.

    Logits are linear in the hidden states, so these are multiplied by `temperature / temperatures[r]`. Rows are counted
    over successive forward passes: together they must be the rows that the temperatures (B,) stand for.

    Raises:
        ValueError: the head has a bias or caps its logits, so that they are not linear.
    """
    inner = without_adapters(model)
    bias = getattr(inner.get_output_embeddings(), "bias", None)
    if bias is not None or getattr(inner.config, "final_logit_softcapping", None):
        raise ValueError(
            "`task_sampling` sets temperatures that differ by task, and this model's logits are not linear in its "
            "hidden states (its head has a bias or caps them). Use one temperature for all tasks"
        )
    done = 0

    def scale(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal done
        states = output.last_hidden_state
        rows = temperatures[done : done + len(states)]
        done += len(states)
        output.last_hidden_state = states * (temperature / rows)[:, None, None]
        return output

    with hooked(inner.base_model, scale):
        yield


@contextmanager
def finite_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Let `generate` sample from equal chances where a row's logits are no distribution, and tell.

    Sampling from NaN raises on a CPU, and on a GPU it ends the process's use of the device for good (pytorch#7647), so
    that nothing could be saved or rolled back.

    Yields:
        A list of tensors, one a forward pass, each True if a row had to be repaired; reading them waits for the device.
    """
    repaired: list[torch.Tensor] = []

    def repair(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        usable = logits.amax(dim=-1, keepdim=True).isfinite()  # not with a NaN or +Inf, nor if all are -Inf
        repaired.append(~usable.all())
        return torch.where(usable, logits, 0.0)

    with hooked(model.get_output_embeddings(), repair):  # type: ignore[operator]
        yield repaired


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other values of an object's attributes for the length of the block."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def positions_from_mask(attention_mask: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Number the attended tokens of each row from 0; padding gets position 0, which nothing attends to.

    Args:
        attention_mask: (B, S), 1 for tokens and 0 for padding, on either side.
        length: return only the last `length` columns (the new tokens, when a cache holds the others).

    Returns:
        (B, length or S), int64.
    """
    positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp_(min=0)
    positions = positions.masked_fill(attention_mask == 0, 0)
    return positions if length is None else positions[:, -length:]


def install_position_hook(model: nn.Module) -> RemovableHandle:
    """Make the backbone of `model` fill `position_ids` from a 2-D `attention_mask` whenever the caller gave none.

    The hook sits on the backbone (`model.base_model`, for GPT-2 `model.transformer`), so that it also serves callers
    that bypass `model.forward`. A PEFT model is unwrapped first. Installing it twice is harmless: the second hook
    finds the positions already set.

    Returns:
        A handle whose `remove()` takes the hook off again.

    Raises:
        ValueError: the backbone takes no `position_ids`, so its positions cannot be set from outside.
    """
    inner = without_adapters(model)
    backbone = getattr(inner, "base_model", inner)
    signature = inspect.signature(type(backbone).forward)
    if "position_ids" not in signature.parameters:
        raise ValueError(
            f"{type(backbone).__name__}.forward takes no `position_ids`, so left-padded batches cannot be scored "
            "correctly; use a model that takes them (GPT-2 and most decoder-only models do)"
        )

    def fill(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = signature.bind_partial(module, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        if given.get("position_ids") is not None or mask is None or mask.ndim != 2:
            return args, kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        kwargs["position_ids"] = positions_from_mask(mask, None if tokens is None else tokens.shape[1])
        return args, kwargs

    return backbone.register_forward_pre_hook(fill, with_kwargs=True)


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
