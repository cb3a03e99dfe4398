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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rookworld_trl.modeling.token_tree import Pairs, TokenTree, tree_logps
from rookworld_trl.training import kl
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.points import FindPoints, Points, points_of_batch
from rookworld_trl.training.scoring import Scorer

# Added to a decision's deviation before J is divided by it: a policy that is nearly sure gets no huge gradient.
LEAST_DEVIATION = 0.05

# Means over all processes, in the log: the decisions' J, its deviation under the policy, the probability of what they
# do not enumerate; nats of a determined sequence.
METRICS = ("exact/value", "exact/deviation", "exact/outside", "exact/determined_nll")


@dataclass(frozen=True, slots=True)
class Scored:
    """Result of `score_tree`; all (B, C), float32, 0 where the completion is masked.

    Attributes:
        logps, entropies: those of the sampled completion tokens (nats).
        objective: sum of the decisions' scaled J and of the determined tokens' log-probs, each in the cell of its
            position: to be maximised, aggregated as the loss aggregates its own terms.
        metrics: sum and count over the batch by name, for the log.
        nodes: tokens of each row's tree behind the prompt.
    """

    logps: Tensor
    entropies: Tensor
    objective: Tensor
    metrics: dict[str, tuple[float, int]]
    nodes: list[int]


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
        points: each row's.
        temperature: that logits are divided by; one for all rows, or (B,) of each.
        scale: divide each decision's J by its reward's deviation under the policy.
    """
    device, shape = batch["completion_ids"].device, batch["completion_ids"].shape
    prompts, completions = (
        [ids[mask].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"].bool(), strict=True)]
        for part in ("prompt", "completion")
    )
    if not all(prompts):
        raise ValueError("a completion follows an empty prompt: begin each prompt with at least one token")
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
    nodes = [len(tree.tokens) - tree.prompt for tree in trees]
    return Scored(sampled_logps, spread(entropies[:sampled]), objective, metrics, nodes)


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
) -> tuple[Tensor, Tensor, dict[str, tuple[float, int]]]:
    """The enumerated objective (B, C) from the log-probs of all pairs, advantages (B,) of what is not, what to log."""
    device, rows = logps.device, len(points)

    def tensor(values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    objective, advantages = logps.new_zeros(rows * columns), logps.new_zeros(rows)
    metrics: dict[str, tuple[float, int]] = {}
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
            seen = {"exact/value": expected, "exact/deviation": deviation, "exact/outside": 1 - per_decision(probs)}
            metrics |= {name: (values.sum().item(), len(values)) for name, values in seen.items()}
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
        metrics["exact/determined_nll"] = (-likelihood.detach().sum().item(), len(likelihood))
        cells = tensor(row) * columns + tensor(position)
        objective = objective.index_add(0, cells, tensor(weight, torch.float) * likelihood)
    return objective.view(rows, columns), advantages, metrics


class ExactObjective:
    """The loss of a micro-batch by its decision points, in TRL's place; rows without any keep TRL's sampled loss.

    Args:
        args: the configuration.
        accelerator: the trainer's.
        policy: the model that is trained.
        scorer: whose log-probs TRL's loss asks for.
        loss: TRL's loss, `(model, inputs) -> loss`.
        find: the points of a sampled completion.
        accumulation: micro-batches in the present optimizer step.
        count: takes a micro-batch and how many tokens stand behind each of its prompts, branches included.
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
        loss: Callable[[nn.Module, dict[str, Any]], Tensor],
        find: FindPoints,
        accumulation: Callable[[], int],
        count: Callable[[dict[str, Any], list[int]], None],
        record: Callable[[str, float], None],
    ):
        self.args, self.accelerator, self.policy, self.scorer, self.loss = args, accelerator, policy, scorer, loss
        self.find, self.accumulation, self.count, self.record = find, accumulation, count, record
        inner: Any = accelerator.unwrap_model(policy)
        problems = {
            "the weights are sharded": accelerator.distributed_type
            in (DistributedType.FSDP, DistributedType.DEEPSPEED),
            f"`attn_implementation` is {inner.config._attn_implementation}, and branches need a mask of their own": (
                inner.config._attn_implementation not in ("sdpa", "eager")
            ),
            "an adapter sits on the output head": hasattr(inner.get_output_embeddings(), "base_layer"),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"`objective` is {args.objective!r}: {problem}. Set it to sampled, or change that")

    def prepare(self, rows: Sequence[dict[str, Any]], batch: dict[str, Any], rewards: Sequence[float]) -> None:
        """Put the points of this process's new completions into the batch, in place of their sampled advantages."""
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        completions = [row[chosen].tolist() for row, chosen in zip(ids, mask, strict=True)]
        samples, sample_rest = self.args.num_generations, self.args.objective == "mixed"
        batch["points"] = points_of_batch(self.find, rows, completions, rewards, samples, sample_rest)
        known = torch.tensor([bool(each["decisions"]) for each in batch["points"]], device=ids.device)
        batch["advantages"] = batch["advantages"].masked_fill(known, 0.0)

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch: TRL's of the advantages that are left, minus the objective of the points."""
        if "points" not in inputs:
            return self.loss(model, inputs)
        head = self.accelerator.unwrap_model(self.policy).get_output_embeddings()
        temperatures = inputs.get("temperatures")
        scored = score_tree(
            model,
            head,
            inputs,
            [Points.read(each) for each in inputs["points"]],
            self.args.temperature if temperatures is None else temperatures,
            self.args.scale_rewards == "group",
        )
        self.count(inputs, scored.nodes)
        sums = torch.tensor(
            [scored.metrics.get(name, (0.0, 0)) for name in METRICS], device=inputs["prompt_ids"].device
        )
        for name, (total, count) in zip(METRICS, self.accelerator.reduce(sums, "sum").tolist(), strict=True):
            if count:
                self.record(name, total / count)
        with self.scorer.given(scored.logps, scored.entropies):
            loss = self.loss(model, inputs)
        weights = kl.loss_weights(self.args, inputs, self.accelerator.num_processes, True, self.accumulation())
        return loss - kl.aggregate(scored.objective, inputs["completion_mask"], *weights)
