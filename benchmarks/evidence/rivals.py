"""The cheaper ways, as plain loops over the shipped prompts: supervised training, and best-of-n fine-tuning.

All of them update with AdamW at a rate that falls to 0 with the budget, clip the gradient at 1, and take `A:` prompts
and positions in check in the shares that the recipes of GRPO have.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from benchmarks.common import REWARDS, padded, shipped
from benchmarks.evidence.budget import Budget
from benchmarks.evidence.sizes import Size
from rookworld_trl.chess.mixing import mix
from rookworld_trl.chess.rewards.decisions import ChessPoints
from rookworld_trl.modeling.completions import completion_texts
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training.exact import Points, score_tree

Row = dict[str, Any]
BATCHES = 4_000  # laid out; more than a CPU gets through
ENVIRONMENT, CHECK = 0.25, 0.1667  # every arm's share of `A:` prompts, and of the others that of positions in check


def batches(prompts: int, seed: int) -> Iterator[list[Row]]:
    """Batches of training rows without end, a quarter of them `A:`, a sixth of the others in check: by the recipes'
    plan."""
    strata = {"check": CHECK}
    plan = mix(
        shipped("train"), ENVIRONMENT, prompts_per_batch=prompts, batches=BATCHES, seed=seed, policy_strata=strata
    )
    for start in itertools.cycle(range(0, len(plan), prompts)):
        yield list(plan.select(range(start, start + prompts)))


def train(
    model: PreTrainedModel,
    choose: Callable[[list[Row]], tuple[list[Any], int]],
    loss: Callable[[list[Any], list[Any]], Tensor],
    rows: Iterator[list[Row]],
    size: Size,
    budget: Budget,
) -> None:
    """AdamW until the budget is used up.

    Args:
        choose: of a batch of rows, what is learned from, and how many completions that took.
        loss: of some of what is learned from, beside all of it: their share of its mean.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.0)
    for batch in rows:
        optimizer.param_groups[0]["lr"] = size.learning_rate * budget.factor
        with size.autocast():
            chosen, samples = choose(batch)
        most = -(-len(chosen) // size.pieces)
        for start in range(0, len(chosen), most or 1):
            with size.autocast():
                value = loss(chosen[start : start + most], chosen)
            value.backward()
        if not chosen:  # a step all the same: Adam's moments go on
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if budget.step(samples):
            return


def likelihood(model: PreTrainedModel, pad: int, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Mean cross-entropy of the completions' tokens (nats), rows padded on the right, so that positions are plain."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(prompts), width), pad)
    labels = torch.full((len(prompts), width), -100)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        end = len(p) + len(c)
        ids[i, :end], mask[i, :end] = torch.tensor(p + c), 1
        labels[i, len(p) : end] = torch.tensor(c)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(model.device))


Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its completion


def of_pairs(model: PreTrainedModel, pad: int) -> Callable[[list[Pair], list[Pair]], Tensor]:
    """The mean cross-entropy of all completions' tokens, as a loss for `train`."""

    def loss(pairs: list[Pair], chosen: list[Pair]) -> Tensor:
        own, every = (sum(len(completion) for _, completion in each) for each in (pairs, chosen))
        value = likelihood(model, pad, [prompt for prompt, _ in pairs], [completion for _, completion in pairs])
        return value * (own / every)

    return loss


def encode(tokenizer: Any, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of the rows' right answers, end token included."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"]
    return prompts, [[*ids, tokenizer.eos_token_id] for ids in answers]


def gold(model: PreTrainedModel, tokenizer: Any, size: Size, budget: Budget, seed: int, rows: int) -> None:
    """Continued supervised training on the right answers."""

    def choose(batch: list[Row]) -> tuple[list[Pair], int]:
        return list(zip(*encode(tokenizer, batch), strict=True)), len(batch)

    train(model, choose, of_pairs(model, tokenizer.pad_token_id), batches(rows, seed), size, budget)


class SoftPoints:
    """Decision points turned into soft labels: every action is right with probability softmax(reward / temperature).

    The likelihood of a determined sequence is its log-prob times its weight, so an action's share of the label is a
    weight, and a decision's are a cross-entropy to the whole distribution.
    """

    def __init__(self, tokenizer: Any, temperature: float) -> None:
        self.find, self.temperature = ChessPoints(tokenizer), temperature

    def __call__(self, row: Row, completion: Sequence[int]) -> Row:
        points = self.find(row, completion)
        soft = []
        for decision in points["decisions"]:
            if "otherwise" in decision:  # it holds the format, which right answers teach by themselves
                continue
            logits = np.array(decision["rewards"]) / self.temperature
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            soft += [
                {"position": decision["position"], "tokens": tokens, "weight": float(decision["weight"] * share)}
                for tokens, share in zip(decision["actions"], shares, strict=True)
            ]
        return {"decisions": [], "determined": points["determined"] + soft}


def soft(
    model: PreTrainedModel,
    tokenizer: Any,
    size: Size,
    budget: Budget,
    seed: int,
    rows: int,
    temperature: float,
) -> None:
    """Supervised training on soft labels from the same table of rewards as the exact gradient, on gold prefixes.

    The prefixes are the stored lists, in another random order each time, so that no slot means one rank.
    """
    find, rng = SoftPoints(tokenizer, temperature), random.Random(seed)

    def choose(batch: list[Row]) -> tuple[list[Any], int]:
        prompts, answers = encode(tokenizer, [row | {"target": _shuffled(row, rng)} for row in batch])
        points = [Points.read(find(row, answer)) for row, answer in zip(batch, answers, strict=True)]
        return list(zip(prompts, answers, points, strict=True)), len(batch)

    def loss(some: list[Any], chosen: list[Any]) -> Tensor:
        prompts, answers, points = (list(each) for each in zip(*some, strict=True))
        batch = {name: values.to(model.device) for name, values in padded(prompts, answers).items()}
        scored = score_tree(GPT2.sharing(model), model.get_output_embeddings(), batch, points)
        return -scored.objective.sum() / len(chosen)

    train(model, choose, loss, batches(rows, seed), size, budget)


def _shuffled(row: Row, rng: random.Random) -> str:
    """The target with its candidates, and their evals, in random order; `A:` targets as they are."""
    if row["task"] != "policy":
        return str(row["target"])
    head, best = row["target"].split(" B: ")
    moves, evals = (part.split() for part in head.removeprefix(" M: ").split(" E: "))
    pairs = rng.sample(list(zip(moves, evals, strict=True)), len(moves))
    return f" M: {' '.join(m for m, _ in pairs)} E: {' '.join(e for _, e in pairs)} B: {best}"


def raft(
    model: PreTrainedModel,
    tokenizer: Any,
    size: Size,
    budget: Budget,
    seed: int,
    rows: int,
    samples: int,
    temperature: float,
) -> None:
    """Best-of-n fine-tuning (RAFT, arXiv 2304.06767): of each prompt's samples the best is learned from.

    Samples, rewards and temperature are those of GRPO. A prompt whose samples all earn the same teaches nothing
    and is left out.
    """
    batch_number = 0

    def choose(batch: list[Row]) -> tuple[list[Pair], int]:
        nonlocal batch_number
        batch_number += 1
        prompts = tokenizer([row["prompt"] for row in batch])["input_ids"]
        sampled = rollout(
            model,
            prompts,
            num_samples=samples,
            max_new_tokens=size.tokens,
            eos_token_id=tokenizer.eos_token_id,
            temperature=temperature,
            seed=seed * 100_003 + batch_number,
        ).completion_ids
        repeated = [row for row in batch for _ in range(samples)]
        columns: dict[str, list[Any]] = {name: [row[name] for row in repeated] for name in repeated[0]}
        columns["prompts"] = columns.pop("prompt")
        texts = completion_texts(tokenizer, sampled)
        earned = np.zeros(len(texts))
        for reward in REWARDS:
            values = reward(completions=texts, **columns)
            earned += [0.0 if value is None else value for value in values]
        best = earned.reshape(-1, samples)
        chosen = [i for i in range(len(batch)) if best[i].max() > best[i].min()]
        return [(prompts[i], sampled[i * samples + int(best[i].argmax())]) for i in chosen], len(texts)

    train(model, choose, of_pairs(model, tokenizer.pad_token_id), batches(rows, seed), size, budget)
