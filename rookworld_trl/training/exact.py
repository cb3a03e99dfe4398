"""The exact policy gradient: where the reward of every answer is known, the expectation is summed, not sampled.

Let a policy pi write a completion and let a *decision point* be a place in it, after the prefix s, where one of the
actions a in A(s) is taken (each a sequence of tokens, none the beginning of another) and r(a) is earned there; whatever
else the policy may write at s earns r_0. Then, with the prefix held fixed,

    J(s) = r_0 + sum_a pi(a | s) (r(a) - r_0),      grad J(s) = sum_a r(a) grad pi(a | s)

is a finite sum: the all-action policy gradient (Sutton et al., 2000, theorem 1; "mean actor-critic", arXiv 1709.00503;
"expected policy gradients", arXiv 1706.05374; with enumerated answers of language models, FGPO, arXiv 2609.10221). GRPO
estimates the same from samples, whose noise is gone here: the variance that remains is that of the sampled prefixes
(Rao-Blackwell). The probability of every action comes from one forward pass over a tree: the completions sampled for a
prompt, with the actions' tokens as branches, each distinct token once.

What is summed and what is left out. A completion's reward is taken to be a sum of terms, each settled at its decision
point. Its whole gradient is

    grad E[R] = E_s [ sum_k grad J_k(s_k) ] + E_s [ sum_k J_k(s_k) grad log pi(s_k) ],

and the first sum is what this module computes. The second, what an early choice does to the decision points behind it
(a candidate listed now cannot be listed later), is left out: its terms can only be sampled, and would bring back the
noise. `tests/training/test_exact.py` enumerates both sums on a small vocabulary.

Scaling. As GRPO divides a group's advantages by their deviation, a decision point's J is divided by the deviation of
its reward under the policy, in closed form: sigma^2 = sum_a pi(a) r(a)^2 - J^2 with rewards counted from r_0. For one
right answer of probability p that earns 1 it is sqrt(p (1 - p)): the gradient is sqrt(p / (1 - p)) grad log p.

*Determined tokens* have one right value given what stands before them (structure, numbers that follow from the sampled
moves, the end). They are learned by their log-likelihood: nothing else holds the format together, since the decision
points know only about what they enumerate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.modeling.forest import Forest
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.gates import GateResult, enforce
from rookworld_trl.training.loss import Scored
from rookworld_trl.training.sampler import task_of
from rookworld_trl.training.scoring import Scorer

logger = logging.get_logger(__name__)

# Added to a decision's deviation before J is divided by it: a policy that is nearly sure gets no huge gradient.
LEAST_DEVIATION = 0.05

# Means over an optimizer step, in the log: J of the decisions whose actions are to be taken, its deviation under the
# policy, the probability of what they do not enumerate; nats of a determined sequence.
METRICS = ("exact/value", "exact/deviation", "exact/outside", "exact/determined_nll")


@dataclass(frozen=True, slots=True)
class Decision:
    """A place in a completion where one of several actions is taken, and what each of them earns.

    Attributes:
        position: completion tokens before it.
        actions: token ids of each action; none is empty or the beginning of another, so that they exclude each other.
        rewards: what each action earns.
        otherwise: reward of everything else that may stand there.
        weight: the decision's in the objective.
    """

    position: int
    actions: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]
    otherwise: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.actions or len(self.actions) != len(self.rewards):
            raise ValueError(
                f"decision at token {self.position}: {len(self.actions)} actions and {len(self.rewards)} rewards; give "
                "at least one action, and one reward for each"
            )
        ordered = sorted(self.actions)
        # The beginning of a sequence sorts right before the sequences that it begins.
        for first, second in zip([(), *ordered], ordered, strict=False):
            if second[: len(first)] == first and (first or not second):
                raise ValueError(
                    f"decision at token {self.position}: action {list(first)} begins action {list(second)}, so their "
                    "probabilities cannot be added; end each action with a token that only follows it whole"
                )


@dataclass(frozen=True, slots=True)
class Determined:
    """Tokens that have one right value given the `position` completion tokens before them."""

    position: int
    tokens: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rest:
    """What a prompt's samples say about the completions that its one decision does not enumerate.

    Attributes:
        reward: the reward of this row's sample; None if it is one of the actions, whose part is exact.
        mean, variance: those of the rewards of all the prompt's samples that are none of the actions.
    """

    reward: float | None
    mean: float
    variance: float


@dataclass(frozen=True, slots=True)
class Points:
    """What is known about one sampled completion.

    Attributes:
        decisions, determined: in it; positions lie within the completion.
        rest: the actions of the only decision are whole completions, and others earn something, too: their part of
            the gradient is sampled.
    """

    decisions: tuple[Decision, ...] = ()
    determined: tuple[Determined, ...] = ()
    rest: Rest | None = None

    def __post_init__(self) -> None:
        if self.rest is not None and [each.position for each in self.decisions] != [0]:
            raise ValueError(
                "the rest is sampled only beside one decision at token 0, whose actions are whole completions; "
                f"found decisions at tokens {[each.position for each in self.decisions]}"
            )

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "Points":
        """From plain data: `decisions` and `determined` as lists of their classes' arguments, `rest` likewise.

        Raises:
            ValueError: it is not that; says what is wrong.
        """
        try:
            decisions = [
                Decision(**{**each, "actions": tuple(map(tuple, each["actions"])), "rewards": tuple(each["rewards"])})
                for each in plain.get("decisions", ())
            ]
            determined = [
                Determined(**{**each, "tokens": tuple(each["tokens"])}) for each in plain.get("determined", ())
            ]
            rest = None if plain.get("rest") is None else Rest(**plain["rest"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"decision points are not as `Decision` and `Determined` want them: {error!r}") from error
        return cls(tuple(decisions), tuple(determined), rest)


FindPoints = Callable[[dict[str, Any], Sequence[int]], Mapping[str, Any]]
"""Takes a row of the data set and the token ids of a completion sampled for it, end token included; gives `decisions`,
`determined` and, where the actions of the only decision are whole completions, `rest_is_sampled`."""


def points_of_batch(
    find: FindPoints,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float],
    samples: int,
    sample_rest: bool,
) -> list[dict[str, Any]]:
    """The points of sampled completions as plain data, which checkpoints keep and `Points.read` reads.

    Args:
        rows: rows of the data set, one for each completion; those of one prompt follow each other, `samples` at a time.
        completions: token ids, end token included; without any where it is masked, and then it has no points.
        rewards: each completion's; NaN where it has none.
        sample_rest: estimate what is not enumerated from the samples, where `find` says that there is something;
            otherwise it counts as 0.

    Raises:
        ValueError: points that are impossible, with the row.
    """
    found = []
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        plain = {"decisions": [], "determined": [], **(find(row, completion) if completion else {})}
        if plain.pop("rest_is_sampled", False):
            plain["rest"] = {"reward": rewards[number], "mean": 0.0, "variance": 0.0}
        try:
            known = Points.read(plain)
            positions = [each.position for each in known.decisions] + [each.position for each in known.determined]
            end = max(positions, default=-1)
            if end >= len(completion):
                raise ValueError(f"position {end} lies behind the completion's {len(completion)} tokens")
        except ValueError as error:
            raise ValueError(f"points of row {number}, prompt {row.get('prompt')!r}: {error}") from error
        if known.rest is None or not sample_rest:
            plain["rest"] = None
        elif tuple(completion) in known.decisions[0].actions or not math.isfinite(rewards[number]):
            plain["rest"]["reward"] = None
        found.append(plain)
    for start in range(0, len(found), samples):
        group = [each["rest"] for each in found[start : start + samples] if each["rest"] is not None]
        others = [each["reward"] for each in group if each["reward"] is not None]
        for rest in group:
            rest["mean"] = float(np.mean(others)) if others else 0.0
            rest["variance"] = float(np.var(others)) if others else 0.0
    return found


def score_tree(
    model: nn.Module | GPT2,
    head: nn.Module,
    batch: dict[str, Any],
    points: Sequence[Points],
    temperature: float | Tensor = 1.0,
    scale: bool = True,
    entropy_gradient: bool = False,
) -> Scored:
    """Score sampled completions and all actions of their decision points in one forward pass of the model.

    The objective is the sum of the decisions' scaled J and of the determined tokens' log-probs, each in the cell of its
    position.

    Args:
        model: called with token ids, a mask (T, 1, S, S) and position ids: wrapped or not, with adapters or not; or its
            weights alone, which are faster.
        head: its output embeddings, applied in float32 to the nodes that predict something.
        batch: `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, C).
        points: each row's.
        temperature: that logits are divided by; one for all rows, or (B,) of each.
        scale: divide each decision's J by its reward's deviation under the policy.
        entropy_gradient: the entropies are differentiable too.
    """
    ids, mask, after, real = (batch[f"{side}_{part}"] for side in ("prompt", "completion") for part in ("ids", "mask"))
    forest = Forest(ids, mask, after, real, temperature)
    decisions = [(row, each) for row, known in enumerate(points) for each in known.decisions]
    determined = [(row, each) for row, known in enumerate(points) for each in known.determined]
    actions = [(row, each.position, action) for row, each in decisions for action in each.actions]
    sequences = [*actions, *((row, each.position, each.tokens) for row, each in determined)]
    for row, at, tokens in sequences:
        tree, nodes = forest.paths[row]
        forest.want(tree, nodes[at], tokens)
    logps, entropies = forest.logps(model, head.weight, entropy_gradient=entropy_gradient)  # type: ignore[arg-type]
    sampled_logps, device = forest.of_completions(logps), logps.device
    owners = [number for number, (_, _, tokens) in enumerate(sequences) for _ in tokens]
    owner_of_token = torch.tensor(owners, dtype=torch.long, device=device)
    of_sequences = logps.new_zeros(len(sequences)).index_add(0, owner_of_token, logps[len(logps) - len(owners) :])
    of_actions, likelihoods = of_sequences.split([len(actions), len(determined)])
    sums = _Sums([each for _, each in decisions], of_actions.exp())
    against, deviation, surplus = _beside_rest(sums, [points[row].rest for row, _ in decisions])
    of_decisions = sums.weights / (deviation + LEAST_DEVIATION) if scale else sums.weights
    decided = of_decisions * (sums.value - against * sums.total)
    weights = torch.tensor([each.weight for _, each in determined], dtype=torch.float, device=device)
    both: list[tuple[int, Decision | Determined]] = [*decisions, *determined]
    shape = sampled_logps.shape
    places = [(row, row * shape[1] + each.position) for row, each in both]
    rows, cells = torch.tensor(places, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    advantages = logps.new_zeros(len(points)).index_add(0, rows[: len(decisions)], of_decisions * surplus)
    wanted = sums.over((sums.rewards > 0).float()) > 0  # elsewhere the actions are only what must not be
    seen = {
        "exact/value": (sums.value + sums.otherwise)[wanted],
        "exact/deviation": sums.deviation[wanted],
        "exact/outside": 1 - sums.total[wanted],
        "exact/determined_nll": -likelihoods,
    }
    terms = logps.new_zeros(shape.numel()).index_add(0, cells, torch.cat([decided, weights * likelihoods]))
    return Scored(
        sampled_logps,
        forest.of_completions(entropies),
        terms.view(shape) + advantages[:, None] * sampled_logps,
        metrics={name: (values.detach().sum().item(), len(values)) for name, values in seen.items()},
    )


class _Sums:
    """Sums over the actions (A,) of each decision (D,), under the policy; rewards count from what all else earns.

    Attributes:
        total: probability of the actions.
        value: their probabilities times rewards: J - r_0.
        deviation: of the reward, without gradient.
        otherwise: r_0.
    """

    def __init__(self, decisions: Sequence[Decision], probs: Tensor):
        tensor = partial(torch.tensor, dtype=torch.float, device=probs.device)
        self.owners = tensor([n for n, each in enumerate(decisions) for _ in each.actions], dtype=torch.long)
        self.weights, self.otherwise = tensor([(each.weight, each.otherwise) for each in decisions]).view(-1, 2).T
        self.rewards = tensor([reward - each.otherwise for each in decisions for reward in each.rewards])
        self.probs, self.total, self.value = probs, self.over(probs), self.over(probs * self.rewards)
        with torch.no_grad():
            self.deviation = (self.over(probs * self.rewards.square()) - self.value.square()).clamp(min=0).sqrt()

    def over(self, values: Tensor) -> Tensor:
        """(D,) from (A,)."""
        return values.new_zeros(len(self.otherwise)).index_add(0, self.owners, values)


@torch.no_grad()
def _beside_rest(sums: _Sums, rests: Sequence[Rest | None]) -> tuple[Tensor, Tensor, Tensor]:
    """What stands against the rewards of each decision (D,) beside r_0, their deviation, the sample's above the mean.

    An outcome's gradient is that of its probability times its reward, counted from what stands against it. Where the
    rest is sampled, its rewards take part in mean and deviation, and the mean is the baseline that stands against all;
    elsewhere the sum is complete: it is nothing, and so is the last.
    """
    given = [each or Rest(None, math.nan, math.nan) for each in rests]
    mean = sums.rewards.new_tensor([each.mean for each in given])
    variance = sums.rewards.new_tensor([each.variance for each in given])
    reward = sums.rewards.new_tensor([math.nan if each.reward is None else each.reward for each in given])
    outside = 1 - sums.total
    baseline = sums.value + sums.otherwise + outside * (mean - sums.otherwise)
    errors = sums.rewards + sums.otherwise[sums.owners] - baseline[sums.owners]
    variance_with_rest = sums.over(sums.probs * errors**2) + outside * (variance + (mean - baseline) ** 2)
    return (
        torch.where(mean.isnan(), 0.0, baseline - sums.otherwise),
        torch.where(mean.isnan(), sums.deviation, variance_with_rest.sqrt()),
        (reward - baseline).nan_to_num(0.0),
    )


class ExactObjective:
    """Scores a micro-batch with the actions of its decision points; rows without any keep their sampled advantages.

    Args:
        args: the configuration.
        accelerator: the trainer's.
        policy: the model that is trained.
        scorer: of batches without points.
        find: the points of a sampled completion.
        decode: the text of token ids, for messages.
        record: takes the name and value of a metric.

    Raises:
        ValueError: a model whose forward pass takes no tree: sharded, flash attention, an adapter on the output head.
    """

    def __init__(
        self,
        args: RookWorldGRPOConfig,
        accelerator: Accelerator,
        policy: nn.Module,
        scorer: Scorer,
        find: FindPoints,
        decode: Callable[[list[int]], str],
        record: Callable[[str, float], None],
    ):
        self.args, self.accelerator, self.policy, self.scorer = args, accelerator, policy, scorer
        self.find, self.decode, self.record = find, decode, record
        self._seen: list[Tensor] = []  # sums and counts of `METRICS` in the present optimizer step's micro-batches
        self.begun = False  # a batch has had decisions of every task that it had completions of
        inner: Any = accelerator.unwrap_model(policy)
        problems = {
            "the weights are sharded": ranks.sharded(accelerator),
            f"`attn_implementation` is {inner.config._attn_implementation}, and branches need a mask of their own": (
                inner.config._attn_implementation not in ("sdpa", "eager")
            ),
            "an adapter sits on the output head": hasattr(inner.get_output_embeddings(), "base_layer"),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"`objective` is {args.objective!r}: {problem}. Set it to sampled, or change that")
        if args.torch_compile and not scorer.shared:
            logger.warning(
                f"`objective` is {args.objective}: where prefixes are not shared (`share_prefixes`), a hook watches "
                "the policy's forward pass, so it runs uncompiled; `torch_compile` compiles what is left"
            )

    def prepare(self, rows: Sequence[dict[str, Any]], batch: dict[str, Any], rewards: Sequence[float]) -> None:
        """Put the points of this process's new completions into the batch, and which rows still learn by their samples.

        Raises:
            GateError: no completion of a task reaches a decision, before any update. Later such a task is left out of
                the batch, and reported.
        """
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        completions = [row[chosen].tolist() for row, chosen in zip(ids, mask, strict=True)]
        samples, sample_rest = self.args.num_generations, self.args.objective == "mixed"
        batch["points"] = points_of_batch(self.find, rows, completions, rewards, samples, sample_rest)
        lost = self._lost(rows, completions, batch["points"])
        by_samples = []
        for task, point in zip(map(task_of, rows), batch["points"], strict=True):
            if task in lost:
                point["determined"] = []
            by_samples.append(task not in lost and not point["decisions"])
        batch["by_samples"] = torch.tensor(by_samples, device=ids.device)

    def _lost(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[list[int]], points: Sequence[dict[str, Any]]
    ) -> set[str]:
        """Tasks of which no completion, in any process, reaches a decision, though something is to stand in them.

        A completion that is masked has no part, here neither.
        """
        flags = [(bool(each["decisions"]), bool(each["determined"])) for each in points]
        tasks = [task_of(row) for row in rows]
        known = zip(tasks, flags, completions, strict=True)
        everyone = ranks.everyones([(task, flag) for task, flag, completion in known if completion])
        lost = {}
        for task in sorted({task for task, known in everyone if any(known)}):
            decided = [decision for each, (decision, _) in everyone if each == task]
            self.record(f"exact/decided/{task}", sum(decided) / len(decided))
            if not any(decided):
                here = zip(tasks, completions, points, strict=True)
                mine = [(ids, each["determined"]) for name, ids, each in here if name == task and each["determined"]]
                examples = []  # what a completion says, and what it should have said
                for ids, determined in mine[:1]:
                    right = max(determined, key=lambda each: each["position"])
                    wanted, said = self.decode(right["tokens"]), self.decode(ids[right["position"] :][:20])
                    examples.append(f"{said!r} was sampled where {wanted!r} belongs")
                lost[task] = next(text for text in ranks.everyones(examples or [""]) if text)
        problem = "; ".join(f"task {task!r}: {example}" for task, example in lost.items())
        if lost and not self.begun:
            remedy = (
                f"No completion of a task reaches a place where something is decided ({problem}): start from a model "
                "that writes the task's format, which supervised training teaches, or set `objective` to sampled"
            )
            enforce([GateResult("decisions", float(len(lost)), 0.0, remedy, unit="tasks")])
        self.begun = self.begun or bool(everyone)
        if lost and self.accelerator.is_main_process:
            logger.warning(f"no completion reaches a decision, so none of the task is trained on ({problem})")
        return set(lost)

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Scored:
        """Log-probs, entropies and objective of a micro-batch, from one forward pass."""
        if "points" not in batch:
            return self.scorer.of_batch(model, batch)
        head = self.accelerator.unwrap_model(self.policy).get_output_embeddings()
        temperatures = batch.get("temperatures")
        with self.accelerator.autocast():  # a model that is called has its own
            scored = score_tree(
                self.scorer.weights(model) if self.scorer.shared else model,
                head,
                batch,
                [Points.read(each) for each in batch["points"]],
                self.args.temperature if temperatures is None else temperatures,
                self.args.scale_rewards == "group",
                entropy_gradient=bool(self.args.entropy_coef),
            )
        # A mean of the micro-batches' means would weigh one with few points like one with many.
        self._seen.append(torch.tensor([scored.metrics[name] for name in METRICS], device=self.accelerator.device))
        if self.accelerator.sync_gradients:
            sums, self._seen = torch.stack(self._seen).sum(dim=0), []
            for name, (total, count) in zip(METRICS, self.accelerator.reduce(sums, "sum").tolist(), strict=True):
                if count:
                    self.record(name, total / count)
        return replace(scored, by_samples=batch["by_samples"])
