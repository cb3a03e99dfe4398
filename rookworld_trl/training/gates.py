"""Gates: what must hold on the first batch, before the first update, or the run would learn from wrong numbers.

* `dropout`: scoring the same rows twice gives the same log-probs.
* `padding`: log-probs in the loss of a padded, mixed-length batch equal those of each row scored alone.
* `temperature`: the loss divides logits by the temperature that the sampler used.
* `truncation`: the sampler drew from the whole vocabulary: no top-k, top-p, min-p, penalty, greedy or beam search.
* `sampled_ids`: the tokens in the loss are the tokens that were sampled, not a re-tokenisation of their text.
* `reference`: while policy and reference have the same weights, KL(policy || reference) is 0.
* `weights`: an update of the learning rate's size changes the weights, in the precision they are kept in.
* `sampler`: log-probs in the loss equal those recorded while sampling, so the log-ratio starts at 0.

Each gate measures one number against one bound. This package's trainer passes them; any `GRPOTrainer` of TRL's does by
`rookworld_trl.doctor.GateCallback`.

The gates are given the scoring function of the loss, TRL's `_get_per_token_logps_and_entropies` or one like it. Where
rows have temperatures of their own, the batch holds them as `temperatures` (B,), and it gets them by that name.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rookworld_trl import ranks
from rookworld_trl.modeling.hooks import without_adapters
from rookworld_trl.training.sampler import Samples

GATES = ("dropout", "padding", "temperature", "truncation", "sampled_ids", "reference", "weights", "sampler")
Score = Callable[..., tuple[torch.Tensor, Any, Any]]
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
        """Bounds for float32, or where something computes in 16 bits (`mixed`)."""
        return cls(logp=0.1, kl=1e-3, average=True) if mixed else cls(logp=1e-4, kl=1e-6, average=False)

    def measure(self, deviations: torch.Tensor) -> float:
        """Mean or largest of non-negative deviations; NaN if one is NaN, 0 if there are none."""
        if not deviations.numel():
            return 0.0
        return (deviations.double().mean() if self.average else deviations.double().max()).item()


@dataclass(frozen=True)
class GateResult:
    """What a gate, one of `GATES`, measured on the first batch.

    Attributes:
        measured: the number, in `unit` (nats are those of a token); a NaN never passes.
        bound: the largest that passes.
        remedy: what to do where it does not.
    """

    gate: str
    measured: float
    bound: float
    remedy: str
    unit: str = "nats"

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound

    def __str__(self) -> str:
        verdict, remedy = ("holds", "") if self.passed else ("FAILS", f". {self.remedy}")
        return f"gate '{self.gate}' {verdict}: measured {self.measured:.3g}, bound {self.bound:.3g}{remedy}"


class GateError(RuntimeError):
    """A gate failed; no update was made.

    Attributes:
        results: every gate's measurement, the failed ones among them.
    """

    def __init__(self, results: Sequence[GateResult]):
        self.results = tuple(results)
        failed = [str(result) for result in results if not result.passed]
        super().__init__("training refused before the first update: " + "; ".join(failed))


def enforce(results: Sequence[GateResult]) -> None:
    """Raises:
    GateError: a gate does not hold.
    """
    if not all(result.passed for result in results):
        raise GateError(results)


def score_alone(model: nn.Module, prompt: torch.Tensor, completion: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs (C,) of `completion` (C,) after `prompt` (P,): one row, no padding, positions 0, 1, 2, ...

    Independent of the fused head that the loss uses, and, its positions being given, of the position hook.
    """
    row = torch.cat([prompt, completion])[None]
    positions = {"position_ids": torch.arange(row.shape[1], device=row.device)[None]}
    named = inspect.signature(type(without_adapters(model)).forward).parameters
    if "position_ids" not in named and not any(each.kind is each.VAR_KEYWORD for each in named.values()):
        positions = {}  # ALiBi and the like have none to be wrong
    output = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **positions)
    logits = output.logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logps.gather(-1, completion[:, None])[:, 0]


def loss_logps(score: Score, model: nn.Module, batch: Batch, rows_at_a_time: int) -> torch.Tensor:
    """Log-probs (B, C) as the loss computes them, a micro-batch at a time."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    found = [torch.zeros(0, batch["completion_ids"].shape[1], device=ids.device)]  # every completion is masked out
    for start in range(0, len(ids), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        found.append(score(model, ids[rows], mask[rows], found[0].shape[1], **_temperatures(batch, rows))[0])
    return torch.cat(found)


def _temperatures(batch: Batch, rows: slice) -> dict[str, torch.Tensor]:
    return {"temperatures": batch["temperatures"][rows]} if "temperatures" in batch else {}


def _telling(batch: Batch, count: int) -> Batch:
    """Rows that would show a padding error first: shortest and longest prompts and completions, then the rest."""
    prompts, completions = batch["prompt_mask"].sum(1), batch["completion_mask"].sum(1)
    usable = [row for row in range(len(prompts)) if completions[row] > 0]
    extremes = [f(usable, key=lambda row: int(n[row])) for n in (prompts, completions) for f in (min, max) if usable]
    rows = list(dict.fromkeys(extremes + usable))[:count]
    keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "temperatures", "sampled_at")
    return {key: batch[key][rows] for key in keys if key in batch}


def _alone(part: Batch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each row's number, prompt and completion without padding, and where its completion's tokens are."""
    for row in range(len(part["prompt_ids"])):
        tokens = part["completion_mask"][row].bool()
        prompt = part["prompt_ids"][row][part["prompt_mask"][row].bool()]
        yield row, prompt, part["completion_ids"][row][tokens], tokens


def dropout_gate(score: Score, model: nn.Module, batch: Batch, bounds: Bounds) -> GateResult:
    """Score the most telling rows twice, as the loss does; what differs is chance inside the model."""
    part = _telling(batch, count=4)
    with torch.no_grad():
        first, second = (loss_logps(score, model, part, max(1, len(part["prompt_ids"]))) for _ in range(2))
    return GateResult(
        "dropout",
        bounds.measure((first - second).abs()[part["completion_mask"].bool()]),
        bounds.logp,
        "The same rows score differently each time, so ratios and KL are noise: set `disable_dropout=True` (GPT-2's "
        "config says 0.1), and `attention_dropout` to 0 in the config of a model that drops out by function",
    )


def padding_gate(score: Score, model: nn.Module, batch: Batch, temperature: float, bounds: Bounds) -> GateResult:
    """Score the most telling rows inside the padded batch and alone; what differs must be rounding.

    A batch that happens to hold no padding gets some columns of it, so the gate never passes for want of a case.
    """
    part = _telling(batch, count=4)
    if bool(part["prompt_mask"].all()):
        columns = torch.zeros_like(part["prompt_mask"][:, :1]).repeat(1, 3)
        part["prompt_mask"] = torch.cat([columns, part["prompt_mask"]], dim=1)
        part["prompt_ids"] = torch.cat([columns.to(part["prompt_ids"]), part["prompt_ids"]], dim=1)
    deviations = [torch.zeros(0)]
    with torch.no_grad():
        padded = loss_logps(score, model, part, max(1, len(part["prompt_ids"])))
        for row, prompt, completion, tokens in _alone(part):
            own = part["temperatures"][row].item() if "temperatures" in part else temperature
            deviations.append((padded[row][tokens] - score_alone(model, prompt, completion, own)).abs().cpu())
    return GateResult(
        "padding",
        bounds.measure(torch.cat(deviations)),
        bounds.logp,
        "Padded rows are scored at other positions than the same rows alone: call `install_position_hook` of "
        "`rookworld_trl.modeling.hooks` on the policy and on the reference",
    )


def temperature_gate(
    score: Score, model: nn.Module, batch: Batch, temperatures: Sequence[float], bounds: Bounds
) -> GateResult:
    """Score rows alone, by the loss and by hand at the temperature (of each row of the batch) that the sampler used."""
    part = _telling(batch | {"sampled_at": torch.tensor(temperatures, dtype=torch.float64)}, count=2)
    deviations = [torch.zeros(0)]
    with torch.no_grad():
        for row, prompt, completion, _ in _alone(part):
            ids = torch.cat([prompt, completion])[None]
            own = _temperatures(part, slice(row, row + 1))
            loss = score(model, ids, torch.ones_like(ids), len(completion), **own)[0][0]
            by_hand = score_alone(model, prompt, completion, part["sampled_at"][row].item())
            deviations.append((loss - by_hand).abs().cpu())
    return GateResult(
        "temperature",
        bounds.measure(torch.cat(deviations)),
        bounds.logp,
        f"The sampler divides logits by {temperatures[0]:g} and the loss by another number: set the temperature in "
        "`temperature` alone, not in `generation_kwargs`, and before the trainer is built",
    )


_TRUNCATED = (
    "The loss scores tokens over the whole vocabulary, and they were drawn from a part of it or with a penalty. Set "
    "`top_p` to 1.0, `top_k` to 0, `min_p` to none, `repetition_penalty` to 1.0, and take such keys out of "
    "`generation_kwargs` and of the model's `generation_config.json`"
)
# What changes the distribution that is drawn from, and the values that do not.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "do_sample": (None, True),
    "num_beams": (None, 1),
}


def truncation_gate(sampled: Samples, args: Any) -> GateResult:
    """|Log-prob in the distribution that was drawn from - log-prob over the whole vocabulary|, of the drawn tokens.

    Of a top-p of 0.9 it is up to log(1 / 0.9), always of one sign: what is left over is renormalised. Where the
    sampler's logits are out of sight, the settings of `args` that truncate or replace sampling are counted.
    """
    seen = [each for each in sampled.drawn if each is not None and each.whole is not None]
    if seen:
        logps = torch.tensor([value for each in seen for value in each.logps], dtype=torch.float64)
        whole = torch.tensor([value for each in seen for value in each.whole or ()], dtype=torch.float64)
        measured = (logps - whole).abs().max().item() if len(logps) else 0.0
        return GateResult("truncation", measured, 1e-4, _TRUNCATED)
    asked = {name: getattr(args, name, None) for name in _HARMLESS} | dict(args.generation_kwargs or {})
    found = [f"`{name}={asked[name]}`" for name, harmless in _HARMLESS.items() if asked[name] not in harmless]
    remedy = f"{_TRUNCATED}; found {', '.join(found)}"
    return GateResult("truncation", float(len(found)), 0.0, remedy, unit="settings")


def weights_gate(model: nn.Module, learning_rate: float) -> GateResult:
    """Share of the trainable weights that do not change if a number as large as the learning rate is added.

    Adam's update is about as large as the learning rate, whatever the gradient. Up to 65,536 weights of each tensor
    are tried. What FSDP2 has gathered for a pass is a copy in the precision of the pass; it goes first, so that the
    shards are looked at, which the optimizer changes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    lost = total = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad or not parameter.is_floating_point() or not learning_rate:
            continue
        weights = parameter.detach()
        weights = (weights.to_local() if hasattr(weights, "to_local") else weights).flatten()
        tried = weights[:: max(1, weights.numel() // 65_536)]
        if tried.numel():
            same = (tried + learning_rate == tried) & (tried - learning_rate == tried)
            lost += same.double().mean().item() * weights.numel()
            total += weights.numel()
    return GateResult(
        "weights",
        lost / total if total else 0.0,
        0.1,
        f"An update of {learning_rate:g} is rounded away in these weights: load them in float32 "
        '(`model_init_kwargs={"dtype": "float32"}`) and set `bf16=True`, which computes in 16 bits and keeps 32',
        unit="of weights",
    )


def reference_gate(
    logps: torch.Tensor, reference_logps: torch.Tensor, mask: torch.Tensor, bounds: Bounds
) -> GateResult:
    """Per-token estimate of KL(policy || reference) on the batch, by k3 (zero only where both agree).

    Args:
        logps, reference_logps, mask: (B, C) as the loss computes them; 1 where a token counts.
    """
    log_ratio = (reference_logps - logps).double()[mask.bool()]
    return GateResult(
        "reference",
        bounds.measure(log_ratio.expm1() - log_ratio),
        bounds.kl,
        "Policy and reference disagree before any update: build the reference from the very weights the run starts "
        "from (TRL reads it again from `model.config._name_or_path`), without dropout, with the position hook in both",
    )


def sampled_ids_gate(sampled: Samples, batch: Batch) -> GateResult:
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
        unit="of rows",
    )


def sampler_gate(sampled: Samples, logps: torch.Tensor, mask: torch.Tensor, bounds: Bounds) -> GateResult:
    """|Log-prob in the loss - log-prob recorded while sampling| over the recorded rows.

    Args:
        logps, mask: (B, C); rows that are masked out entirely (truncated completions) are left out.
    """
    deviations = []
    for row, drawn in enumerate(sampled.drawn):
        if drawn is None or not mask[row].any():
            continue
        recorded = torch.tensor(drawn.logps, dtype=torch.float64)
        difference = logps[row, : len(recorded)].cpu().double() - recorded
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
    """Holds the gates until a batch has passed them; the processes of `accelerator` decide alike.

    Attributes:
        pending: no batch has passed yet.
        sampled: the last batch as it was sampled; None where that is out of sight.
    """

    def __init__(self, args: Any, accelerator: Any, model: nn.Module, score: Score):
        self.args, self.accelerator, self.model, self.score = args, accelerator, model, score
        halves = any(each.dtype in (torch.float16, torch.bfloat16) for each in model.parameters())
        self.bounds = Bounds.for_precision(mixed=halves or accelerator.mixed_precision != "no")
        self.pending = True
        self.sampled: Samples | None = None

    def measure(self, batch: Batch, step: int) -> list[GateResult]:
        """Measure every gate; `enforce` judges. Where there is dropout, the other gates are measured without it.

        Args:
            step: optimizer steps done; at 0 policy and reference agree.
        """
        score, model, bounds, args = self.score, self.model, self.bounds, self.args
        results = [dropout_gate(score, model, batch, bounds)]
        # Only where it matters: a model that `torch.compile` has compiled would be compiled once more.
        (chance,) = ranks.largest([results[0].measured], self.accelerator)
        if chance:
            model.eval()
        with torch.no_grad():
            results.append(padding_gate(score, model, batch, args.temperature, bounds))
            logps = loss_logps(score, model, batch, args.per_device_train_batch_size)
            if self.sampled is not None:
                # What the sampler divided each row's logits by: seen where it could be, else as the settings ask.
                seen = [each.temperature if each else None for each in self.sampled.drawn]
                asked = (args.generation_kwargs or {}).get("temperature", args.temperature)
                rest = [next((each for each in seen if each is not None), asked)] * len(seen)
                rest = batch["temperatures"].tolist() if "temperatures" in batch else rest
                divisors = [own if each is None else each for each, own in zip(seen, rest, strict=True)]
                results.append(temperature_gate(score, model, batch, divisors, bounds))
                results.append(truncation_gate(self.sampled, args))
                results.append(sampled_ids_gate(self.sampled, batch))
        if chance:
            model.train()
        mask = batch["completion_mask"]
        if "ref_per_token_logps" in batch and step == 0:
            results.append(reference_gate(logps, batch["ref_per_token_logps"], mask, bounds))
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # it keeps float32 weights out of sight
            results.append(weights_gate(model, args.learning_rate))
        if self.sampled is not None:
            results.append(sampler_gate(self.sampled, logps, mask, bounds))
        worst = ranks.largest([result.measured for result in results], self.accelerator)
        return [replace(result, measured=value) for result, value in zip(results, worst, strict=True)]
