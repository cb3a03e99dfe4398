"""The exact policy gradient: where the reward of every answer is known, the expectation is summed, not sampled.

Let a policy pi write a completion and let a *decision point* be a place in it, after the prefix s, where one of the
actions a in A(s) is taken (each a sequence of tokens, none the beginning of another) and r(a) is earned there; whatever
else the policy may write at s earns r_0. Then, with the prefix held fixed,

    J(s) = r_0 + sum_a pi(a | s) (r(a) - r_0),      grad J(s) = sum_a r(a) grad pi(a | s)

is a finite sum: the all-action policy gradient (Sutton et al., 2000, theorem 1; "mean actor-critic", arXiv 1709.00503;
"expected policy gradients", arXiv 1706.05374; with enumerated answers of language models, FGPO, arXiv 2609.10221). GRPO
estimates the same from samples, whose noise is gone here: the variance that remains is that of the sampled prefixes
(Rao-Blackwell). The probability of every action comes from one forward pass over a tree: the sampled completion with
the actions' tokens as branches, each distinct token once.

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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rookworld_trl.modeling.token_tree import Pairs, TokenTree, tree_logps

# Added to a decision's deviation before J is divided by it: a policy that is nearly sure gets no huge gradient.
LEAST_DEVIATION = 0.05


@dataclass(frozen=True, slots=True)
class Decision:
    """A place in a completion where one of several actions is taken, and what each of them earns.

    Attributes:
        position: completion tokens before it.
        actions: token ids of each action; none is empty or the beginning of another, so that they exclude each other.
        rewards: of each action.
        otherwise: reward of everything else that may stand there.
        weight: of this decision in the objective.
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
        reward: of this row's sample; None if it is one of the actions, whose part is exact.
        mean, variance: of the rewards of all the prompt's samples that are none of the actions.
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


# Of a row of the data set and the token ids of a completion sampled for it, its end token included: `decisions`,
# `determined` and, where the actions of the only decision are whole completions, `rest_is_sampled`.
FindPoints = Callable[[dict[str, Any], Sequence[int]], Mapping[str, Any]]


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
        rows: of the data set, one for each completion; those of one prompt follow each other, `samples` at a time.
        completions: token ids, end token included.
        rewards: of each completion.
        sample_rest: estimate what is not enumerated from the samples, where `find` says that there is something;
            otherwise it counts as 0.

    Raises:
        ValueError: points that are impossible, with the row.
    """
    found = []
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        plain = dict(find(row, completion))
        if plain.pop("rest_is_sampled", False):
            plain["rest"] = {"reward": rewards[number], "mean": 0.0, "variance": 0.0}
        try:
            known = Points.read(plain)
            end = max(
                [each.position for each in known.decisions] + [each.position for each in known.determined], default=0
            )
            if end >= len(completion):
                raise ValueError(f"position {end} lies behind the completion's {len(completion)} tokens")
        except ValueError as error:
            raise ValueError(f"points of row {number}, prompt {row.get('prompt')!r}: {error}") from error
        if known.rest is None or not sample_rest:
            plain["rest"] = None
        elif tuple(completion) in known.decisions[0].actions:
            plain["rest"]["reward"] = None
        found.append(plain)
    for start in range(0, len(found), samples):
        group = [each["rest"] for each in found[start : start + samples] if each["rest"] is not None]
        others = [each["reward"] for each in group if each["reward"] is not None]
        for rest in group:
            rest["mean"] = float(np.mean(others)) if others else 0.0
            rest["variance"] = float(np.var(others)) if others else 0.0
    return found


@dataclass(frozen=True, slots=True)
class Scored:
    """Result of `score_tree`; all (B, C), float32, 0 where the completion is masked.

    Attributes:
        logps, entropies: of the sampled completion tokens (nats).
        objective: sum of the decisions' scaled J and of the determined tokens' log-probs, each in the cell of its
            position: to be maximised, aggregated as the loss aggregates its own terms.
        metrics: means over the batch, for the log.
    """

    logps: Tensor
    entropies: Tensor
    objective: Tensor
    metrics: dict[str, float]


def score_tree(
    model: nn.Module,
    head: nn.Module,
    batch: dict[str, Any],
    points: Sequence[Points],
    temperature: float | Tensor = 1.0,
    scale: bool = True,
) -> Scored:
    """Score sampled completions and all actions of their decision points in one forward pass of the model.

    Args:
        model: called with token ids, a mask (B, 1, S, S) and position ids: wrapped or not, with adapters or not.
        head: its output embeddings, applied in float32 to the nodes that predict something.
        batch: `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, C).
        points: of each row.
        temperature: that logits are divided by; one for all rows, or (B,) of each.
        scale: divide each decision's J by its reward's deviation under the policy.
    """
    device, shape = batch["completion_ids"].device, batch["completion_ids"].shape
    prompts, completions = (
        [ids[mask].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"].bool(), strict=True)]
        for part in ("prompt", "completion")
    )
    trees = [TokenTree(*row) for row in zip(prompts, completions, strict=True)]
    pairs = Pairs()
    for row, (tree, completion) in enumerate(zip(trees, completions, strict=True)):
        pairs.add(row, tree.follow(0, completion), completion)
    sampled = len(pairs.tokens)
    actions = _enumerate(trees, points, pairs)
    logps, entropies = tree_logps(model, head, trees, pairs, temperature, device)

    cells = batch["completion_mask"].bool().flatten().nonzero().squeeze(-1)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(shape.numel()).index_copy(0, cells, values).view(shape)

    objective, advantages, metrics = _objective(actions, logps, points, shape[1], scale)
    sampled_logps = spread(logps[:sampled])
    objective = objective + advantages[:, None] * sampled_logps
    return Scored(sampled_logps, spread(entropies[:sampled]), objective, metrics)


@dataclass(slots=True)
class _Actions:
    """All actions and determined sequences of a batch, flattened; a determined sequence is told by its decision -1."""

    pair: list[int]  # place of each token in `Pairs` ...
    action_of_pair: list[int]  # ... and the action it belongs to
    decision: list[int]  # of each action
    reward: list[float]  # of each action, counted from its decision's `otherwise`
    decision_cell: list[tuple[int, int, float, float]]  # row, position, weight, otherwise
    determined_cell: list[tuple[int, int, int, float]]  # action, row, position, weight


def _enumerate(trees: Sequence[TokenTree], points: Sequence[Points], pairs: Pairs) -> _Actions:
    found = _Actions([], [], [], [], [], [])

    def take(row: int, position: int, tokens: Sequence[int]) -> int:
        action = len(found.decision)
        places = pairs.add(row, trees[row].follow(position, tokens), tokens)
        found.pair += places
        found.action_of_pair += [action] * len(places)
        return action

    for row, known in enumerate(points):
        for decision in known.decisions:
            for tokens, reward in zip(decision.actions, decision.rewards, strict=True):
                take(row, decision.position, tokens)
                found.decision.append(len(found.decision_cell))
                found.reward.append(reward - decision.otherwise)
            found.decision_cell.append((row, decision.position, decision.weight, decision.otherwise))
        for determined in known.determined:
            action = take(row, determined.position, determined.tokens)
            found.decision.append(-1)
            found.reward.append(0.0)
            found.determined_cell.append((action, row, determined.position, determined.weight))
    return found


def _objective(
    found: _Actions, logps: Tensor, points: Sequence[Points], columns: int, scale: bool
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The enumerated objective (B, C) from the log-probs of all pairs, advantages (B,) of what is not, what to log."""
    device, rows = logps.device, len(points)

    def tensor(values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    objective, advantages, metrics = logps.new_zeros(rows * columns), logps.new_zeros(rows), {}
    totals = logps.new_zeros(len(found.decision)).index_add(0, tensor(found.action_of_pair), logps[tensor(found.pair)])
    if found.decision_cell:
        decision = tensor(found.decision)
        chosen = (decision >= 0).nonzero().squeeze(-1)
        decision, probs = decision[chosen], totals[chosen].exp()
        rewards = tensor(found.reward, torch.float)[chosen]
        row, position, weight, otherwise = zip(*found.decision_cell, strict=True)

        def per_decision(values: Tensor) -> Tensor:
            return values.new_zeros(len(found.decision_cell)).index_add(0, decision, values)

        value = per_decision(probs * rewards)
        with torch.no_grad():
            deviation = (per_decision(probs * rewards.square()) - value.square()).clamp(min=0).sqrt()
            expected = value + tensor(otherwise, torch.float)
            metrics = {
                "exact/value": expected.mean().item(),
                "exact/deviation": deviation.mean().item(),
                "exact/outside": (1 - per_decision(probs)).mean().item(),
            }
            total = per_decision(probs)
            rest = [points[each].rest for each in row]
            sampled = tensor([each is not None for each in rest], torch.bool)
            # Where the rest is sampled, its rewards take part in mean and deviation, and the mean is the baseline.
            mean = tensor([0.0 if each is None else each.mean for each in rest], torch.float)
            variance = tensor([0.0 if each is None else each.variance for each in rest], torch.float)
            baseline = expected + (1 - total) * (mean - tensor(otherwise, torch.float)) * sampled
            square = per_decision(
                probs * (rewards + tensor(otherwise, torch.float)[decision] - baseline[decision]) ** 2
            )
            square = square + (1 - total) * (variance + (mean - baseline) ** 2)
            deviation = torch.where(sampled, square.sqrt(), deviation)
            weights = tensor(weight, torch.float)
            if scale:
                weights = weights / (deviation + LEAST_DEVIATION)
            reward = tensor(
                [math.nan if each is None or each.reward is None else each.reward for each in rest], torch.float
            )
            advantages = advantages.index_add(0, tensor(row), (weights * (reward - baseline)).nan_to_num(0.0))
        # An outcome's gradient is that of its probability times its reward, counted from what stands against it:
        # everything else where the sum is complete, the baseline where the rest is sampled.
        against = torch.where(sampled, baseline - tensor(otherwise, torch.float), 0.0)
        cells = tensor(row) * columns + tensor(position)
        objective = objective.index_add(0, cells, weights * (value - against * per_decision(probs)))
    if found.determined_cell:
        action, row, position, weight = zip(*found.determined_cell, strict=True)
        likelihood = totals[tensor(action)]
        metrics["exact/determined_nll"] = -likelihood.detach().mean().item()
        cells = tensor(row) * columns + tensor(position)
        objective = objective.index_add(0, cells, tensor(weight, torch.float) * likelihood)
    return objective.view(rows, columns), advantages, metrics
