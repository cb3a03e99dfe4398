"""Gates: what must hold on the first batch, before the first update, or the run would learn from wrong numbers.

* `padding`: log-probs in the loss of a padded, mixed-length batch equal those of each row scored alone.
* `reference`: while policy and reference have the same weights, KL(policy || reference) is 0.
* `sampled_ids`: the tokens in the loss are the tokens that were sampled, not a re-tokenisation of their text.
* `sampler`: log-probs in the loss equal those recorded while sampling, so the log-ratio starts at 0.

Each gate measures one number against one bound. Nothing here knows a trainer; callers pass the scoring function of
the loss, `score(model, input_ids, attention_mask, logits_to_keep) -> (B, logits_to_keep)` log-probs. Where rows have
temperatures of their own, the batch holds them as `temperatures` (B,), and `score` gets them as a fifth argument.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rookworld_trl import ranks
from rookworld_trl.modeling.hooks import hooked

Score = Callable[..., torch.Tensor]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Bounds:
    """Deviations that rounding explains, in nats.

    Float32: kernels that sum in another order differ by about 1e-6 a logit; 1e-4 leaves room for depth, and the worst
    token must stay below it. Under 16-bit autocast a logit of 64 to 128, which GPT-2 has, moves in steps of 1/2, so
    single tokens say nothing and the mean is measured. Both are far below the faults: wrong positions cost a trained
    model whole nats a token.

    Attributes:
        logp: of log-probs.
        kl: of the KL estimate; policy and reference go through the same kernels and differ less.
        average: measure the mean deviation instead of the largest.
    """

    logp: float
    kl: float
    average: bool

    @classmethod
    def for_precision(cls, mixed: bool) -> "Bounds":
        """Bounds for float32, or for 16-bit autocast over float32 weights (`mixed`)."""
        return cls(logp=0.1, kl=1e-3, average=True) if mixed else cls(logp=1e-4, kl=1e-6, average=False)

    def measure(self, deviations: torch.Tensor) -> float:
        """Mean or largest of non-negative deviations; NaN if one is NaN, 0 if there are none."""
        if not deviations.numel():
            return 0.0
        return (deviations.double().mean() if self.average else deviations.double().max()).item()


@dataclass(frozen=True)
class GateResult:
    """One measurement: `measured` and `bound` share the gate's unit; a NaN never passes."""

    gate: str
    measured: float
    bound: float
    remedy: str

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound

    def __str__(self) -> str:
        verdict = "holds" if self.passed else "FAILS"
        return f"gate '{self.gate}' {verdict}: measured {self.measured:.3g}, bound {self.bound:.3g}"


class GateError(RuntimeError):
    """A gate failed; no update was made.

    Attributes:
        results: every gate's measurement, the failed ones among them.
    """

    def __init__(self, results: Sequence[GateResult]):
        self.results = tuple(results)
        failed = [f"{result}. {result.remedy}" for result in results if not result.passed]
        super().__init__("training refused before the first update: " + "; ".join(failed))


def enforce(results: Sequence[GateResult]) -> None:
    """Raises:
    GateError: a gate does not hold.
    """
    if not all(result.passed for result in results):
        raise GateError(results)


@dataclass(slots=True)
class Sampled:
    """What a sampler returned for one batch, in the batch's order.

    Attributes:
        prompt_ids, completion_ids: token ids, unpadded.
        recorded: log-prob of each completion token where it was sampled; None for rows not recorded.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    recorded: list[list[float] | None]


def score_alone(model: nn.Module, prompt: torch.Tensor, completion: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs (C,) of `completion` (C,) after `prompt` (P,): one row, no padding, positions 0, 1, 2, ...

    Independent of the fused head that the loss uses, and, its positions being given, of the position hook.
    """
    row = torch.cat([prompt, completion])[None]
    positions = torch.arange(row.shape[1], device=row.device)[None]
    output = model(input_ids=row, attention_mask=torch.ones_like(row), position_ids=positions, use_cache=False)
    logits = output.logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logps.gather(-1, completion[:, None])[:, 0]


def loss_logps(score: Score, model: nn.Module, batch: Batch, rows_at_a_time: int) -> torch.Tensor:
    """Log-probs (B, C) as the loss computes them, a micro-batch at a time."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    keep = batch["completion_ids"].shape[1]
    own = (batch["temperatures"].split(rows_at_a_time),) if "temperatures" in batch else ()
    chunks = zip(ids.split(rows_at_a_time), mask.split(rows_at_a_time), *own, strict=True)
    return torch.cat([score(model, rows, row_mask, keep, *rest) for rows, row_mask, *rest in chunks])


def _telling_rows(batch: Batch, count: int) -> list[int]:
    """Rows that would show a padding error first: shortest and longest prompts and completions, then the rest."""
    prompts, completions = batch["prompt_mask"].sum(1), batch["completion_mask"].sum(1)
    usable = [row for row in range(len(prompts)) if completions[row] > 0]
    extremes = [f(usable, key=lambda row: int(n[row])) for n in (prompts, completions) for f in (min, max) if usable]
    return list(dict.fromkeys(extremes + usable))[:count]


def padding_gate(score: Score, model: nn.Module, batch: Batch, temperature: float, bounds: Bounds) -> GateResult:
    """Score the most telling rows inside the padded batch and alone; what differs must be rounding.

    A batch that happens to hold no padding gets some columns of it, so the gate never passes for want of a case.
    """
    rows = _telling_rows(batch, count=4)
    keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "temperatures")
    part = {key: batch[key][rows] for key in keys if key in batch}
    if bool(part["prompt_mask"].all()):
        columns = torch.zeros_like(part["prompt_mask"][:, :1]).repeat(1, 3)
        part["prompt_mask"] = torch.cat([columns, part["prompt_mask"]], dim=1)
        part["prompt_ids"] = torch.cat([columns.to(part["prompt_ids"]), part["prompt_ids"]], dim=1)
    deviations = []
    with torch.no_grad():
        padded = loss_logps(score, model, part, len(rows))
        for row in range(len(rows)):
            prompt = part["prompt_ids"][row][part["prompt_mask"][row].bool()]
            tokens = part["completion_mask"][row].bool()
            own = part["temperatures"][row].item() if "temperatures" in part else temperature
            alone = score_alone(model, prompt, part["completion_ids"][row][tokens], own)
            deviations.append((padded[row][tokens] - alone).abs())
    return GateResult(
        "padding",
        bounds.measure(torch.cat(deviations)),
        bounds.logp,
        "Padded rows are scored at other positions than the same rows alone: install the position hook of "
        "`rookworld_trl.modeling.positions` on the policy, and switch dropout off",
    )


def reference_gate(
    logps: torch.Tensor, reference_logps: torch.Tensor, mask: torch.Tensor, bounds: Bounds
) -> GateResult:
    """Per-token estimate of KL(policy || reference) on the batch, by k3 (zero only where both agree).

    Args:
        logps, reference_logps: (B, C) as the loss computes them, policy and reference.
        mask: (B, C), 1 where a token counts.
    """
    log_ratio = (reference_logps - logps).double()[mask.bool()]
    return GateResult(
        "reference",
        bounds.measure(log_ratio.expm1() - log_ratio),
        bounds.kl,
        "Policy and reference disagree before any update: switch dropout off in both, give both the position hook, "
        "and build the reference from the very weights the run starts from",
    )


def sampled_ids_gate(sampled: Sampled, batch: Batch) -> GateResult:
    """Share of rows whose ids in the batch differ from the ids sampled; must be 0."""
    wrong = 0
    for row, (prompt, completion) in enumerate(zip(sampled.prompt_ids, sampled.completion_ids, strict=True)):
        in_batch = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        in_loss = in_batch + batch["completion_ids"][row][: len(completion)].tolist()
        wrong += in_loss != [*prompt, *completion]
    return GateResult(
        "sampled_ids",
        wrong / len(sampled.completion_ids),
        0.0,
        "The loss scores other tokens than were sampled: pass sampled ids on as they are, never decode and re-encode",
    )


def sampler_gate(sampled: Sampled, logps: torch.Tensor, mask: torch.Tensor, bounds: Bounds) -> GateResult:
    """|Log-prob in the loss - log-prob recorded while sampling| over the recorded rows.

    Args:
        logps: (B, C) as the loss computes them.
        mask: (B, C); rows that are masked out entirely (truncated completions) are left out.
    """
    deviations = []
    for row, row_logps in enumerate(sampled.recorded):
        if row_logps is None or not mask[row].any():
            continue
        difference = logps[row, : len(row_logps)].cpu().double() - torch.tensor(row_logps, dtype=torch.float64)
        deviations.append(difference.abs())
    if not deviations and mask.any():
        deviations.append(torch.tensor([math.nan]))  # nothing was recorded: nothing was checked
    return GateResult(
        "sampler",
        bounds.measure(torch.cat(deviations) if deviations else torch.zeros(0)),
        bounds.logp,
        "The loss scores the sampled tokens differently than the sampler did: use the same weights, positions and "
        "temperature in both, no dropout, no top-p or top-k (with a sampler on other kernels, float32 on both sides)",
    )


class FirstBatch:
    """Holds the gates until a batch has passed them.

    Args:
        args: the configuration.
        accelerator: its processes decide alike, so that none waits for another that raised.
        model: the policy.
        score: as in the module.

    Attributes:
        pending: no batch has passed yet.
        sampled: the last batch as it was sampled.
    """

    def __init__(self, args: Any, accelerator: Any, model: nn.Module, score: Score):
        self.args, self.accelerator, self.model, self.score = args, accelerator, model, score
        self.bounds = Bounds.for_precision(mixed=accelerator.mixed_precision != "no")
        self.pending = True
        self.sampled: Sampled | None = None

    def measure(self, batch: Batch, step: int) -> list[GateResult]:
        """Measure every gate; `enforce` judges.

        Args:
            step: optimizer steps done; at 0 policy and reference agree.
        """
        bounds, mask = self.bounds, batch["completion_mask"]
        results = [padding_gate(self.score, self.model, batch, self.args.temperature, bounds)]
        with torch.no_grad():
            logps = loss_logps(self.score, self.model, batch, self.args.per_device_train_batch_size)
        if "ref_per_token_logps" in batch and step == 0:
            results.append(reference_gate(logps, batch["ref_per_token_logps"], mask, bounds))
        if self.sampled is not None:
            results.append(sampled_ids_gate(self.sampled, batch))
            results.append(sampler_gate(self.sampled, logps, mask, bounds))
        worst = ranks.largest([result.measured for result in results], self.accelerator)
        return [replace(result, measured=value) for result, value in zip(results, worst, strict=True)]


@contextmanager
def record_generate(model: nn.Module, rows: int = 4) -> Iterator[Callable[[list[list[int]], float], list[list[float]]]]:
    """Record the logits that `generate` samples from, for its first `rows` rows, at the output layer itself.

    Yields a function that turns the ids `generate` returned into their log-probs, to be called after the block:
    `logps(completion_ids, temperature)` gives one list for each recorded row.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    steps: list[torch.Tensor] = []

    def logps(completion_ids: list[list[int]], temperature: float) -> list[list[float]]:
        if not steps:
            return []
        table = torch.log_softmax(torch.stack(steps, dim=1) / temperature, dim=-1)  # (rows, steps, V)
        return [
            [table[row, step, token].item() for step, token in enumerate(ids)]
            for row, ids in enumerate(completion_ids[: table.shape[0]])
        ]

    with hooked(head, lambda _, __, logits: steps.append(logits[:rows, -1].detach().float())):
        yield logps
