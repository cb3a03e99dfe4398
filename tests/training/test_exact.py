"""The exact gradient against the sum over every completion of a small vocabulary, each scored plainly."""

import itertools
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.hooks import install_position_hook
from rookworld_trl.training.exact import (
    LEAST_DEVIATION,
    Decision,
    Determined,
    Points,
    Rest,
    points_of_batch,
    score_tree,
)
from tests.support.builders import random_gpt2

VOCABULARY = 5
LENGTH = 4
PROMPTS = ((1, 2, 3), (4,))
# The first decision's actions have one, two and three tokens; whatever begins otherwise is outside.
FIRST = {(1,): 0.2, (2, 1): 1.0, (2, 3): 0.5, (3, 1, 2): 0.7}
SECOND = {(0,): 0.9, (4,): 0.1}


@pytest.fixture
def model() -> GPT2LMHeadModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16}
    model = random_gpt2(seed=3, initializer_range=0.5, **sizes, **dropout).double()
    install_position_hook(model)
    return model


def walk(completion: Sequence[int]) -> list[tuple[int, dict[tuple[int, ...], float], tuple[int, ...] | None]]:
    """The decision points of a completion: (position, actions, the action that was taken); the second follows the
    first's action wherever one was taken, and none ends beyond the completion."""
    steps, position = [], 0
    for actions in (FIRST, SECOND):
        taken = next((a for a in actions if tuple(completion[position : position + len(a)]) == a), None)
        steps.append((position, actions, taken))
        if taken is None:
            break
        position += len(taken)
        if position + 1 > len(completion):
            break
    return steps


def points_of(completion: Sequence[int]) -> Points:
    return Points(tuple(Decision(at, tuple(each), tuple(each.values())) for at, each, _ in walk(completion)))


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]], padding: int = 0) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right, as TRL does, with `padding` more columns on either side."""
    widths = [max(len(row[part]) for row in rows) + padding for part in (0, 1)]
    batch: dict[str, Any] = {"prompt_ids": [], "prompt_mask": [], "completion_ids": [], "completion_mask": []}
    for prompt, completion in rows:
        left, right = widths[0] - len(prompt), widths[1] - len(completion)
        batch["prompt_ids"].append([0] * left + list(prompt))
        batch["prompt_mask"].append([0] * left + [1] * len(prompt))
        batch["completion_ids"].append(list(completion) + [0] * right)
        batch["completion_mask"].append([1] * len(completion) + [0] * right)
    return {key: torch.tensor(value) for key, value in batch.items()}


def plain_logps(
    model: Any, prompt: Sequence[int], temperature: float = 1.0
) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Every completion of `LENGTH` tokens, and the log-prob of each of its tokens by a plain forward pass."""
    completions = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    ids = torch.tensor([[*prompt, *completion] for completion in completions])
    logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1] / temperature
    return completions, torch.log_softmax(logits, -1).gather(2, ids[:, len(prompt) :, None]).squeeze(2)


def gradient(value: torch.Tensor, model: Any) -> torch.Tensor:
    grads = torch.autograd.grad(
        value, [p for p in model.parameters() if p.requires_grad], retain_graph=True, allow_unused=True
    )
    return torch.cat([g.flatten() for g in grads if g is not None])


def sampled_credit(model: Any, prompt: Sequence[int], temperature: float) -> torch.Tensor:
    """The mean over all completions of the sampled gradient in which each action has its own reward for a return."""
    completions, logps = plain_logps(model, prompt, temperature)
    probs = logps.sum(1).exp().detach()
    total = torch.zeros(())
    for prob, completion, row in zip(probs, completions, logps, strict=True):
        for at, actions, taken in walk(completion):
            if taken is not None:
                total = total + prob * actions[taken] * row[at : at + len(taken)].sum()
    return gradient(total, model)


def exact_mean(model: Any, prompt: Sequence[int], temperature: float, padding: int = 0, packed: bool = False) -> Any:
    completions, logps = plain_logps(model, prompt, temperature)
    batch, points = batch_of([(prompt, each) for each in completions], padding), [points_of(c) for c in completions]
    passed = GPT2.sharing(model) if packed else model
    scored = score_tree(passed, model.get_output_embeddings(), batch, points, temperature, scale=False)
    probs = logps.sum(1).exp().detach().float()
    return gradient((probs * scored.objective.sum(1)).sum(), model)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_the_mean_of_the_sampled_gradients_over_all_completions(
    model: GPT2LMHeadModel, prompt: tuple[int, ...], temperature: float, packed: bool
) -> None:
    wanted = sampled_credit(model, prompt, temperature)
    torch.testing.assert_close(exact_mean(model, prompt, temperature, packed=packed), wanted, rtol=2e-5, atol=2e-6)
    assert wanted.norm() > 0.01


def test_with_adapters(model: GPT2LMHeadModel) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).double()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = sampled_credit(adapted, PROMPTS[0], 1.0)
    torch.testing.assert_close(exact_mean(adapted, PROMPTS[0], 1.0), wanted, rtol=2e-5, atol=2e-6)


def test_a_single_decision_has_no_variance_where_sampling_has(model: GPT2LMHeadModel) -> None:
    """With one decision at the beginning every completion gives the same gradient, that of the expectation itself."""
    prompt, actions = PROMPTS[0], FIRST
    completions, logps = plain_logps(model, prompt)
    chosen = [(0, 1, 2, 3), (2, 1, 0, 0), (2, 3, 4, 1), (3, 1, 2, 2), (3, 3, 3, 3)]
    point = Points((Decision(0, tuple(actions), tuple(actions.values())),))
    head = model.get_output_embeddings()
    exact = [
        gradient(score_tree(model, head, batch_of([(prompt, each)]), [point], scale=False).objective.sum(), model)
        for each in chosen
    ]
    expectation = sum(
        actions[taken] * row.sum().exp()
        for completion, row in zip(completions, logps, strict=True)
        if (taken := walk(completion)[0][2]) is not None
    )
    wanted = gradient(expectation, model)
    for each in exact:
        torch.testing.assert_close(each, wanted, rtol=2e-5, atol=2e-6)
    sampled = torch.stack(
        [
            gradient(FIRST.get(walk(c)[0][2], 0.0) * logps[completions.index(c)][:3].sum(), model)  # type: ignore[arg-type]
            for c in chosen
        ]
    )
    assert sampled.var(dim=0).sum() > 0.1


def test_what_is_left_out_is_the_effect_on_later_decisions(model: GPT2LMHeadModel) -> None:
    """grad E[R] = E[sum of grad J] + E[J of the later decision grad log-prob of its prefix], by enumeration."""
    prompt = PROMPTS[0]
    completions, logps = plain_logps(model, prompt)
    probs = logps.sum(1).exp()
    rewards = torch.tensor(
        [sum(actions[taken] for _, actions, taken in walk(c) if taken is not None) for c in completions]
    )
    whole = gradient((probs * rewards).sum(), model)
    later = torch.zeros(())
    for prob, completion, row in zip(probs.detach(), completions, logps, strict=True):
        steps = walk(completion)
        if len(steps) == 2 and steps[1][2] is not None:
            later = later + prob * steps[1][1][steps[1][2]] * row[: steps[1][0]].sum()
    left_out = gradient(later, model)
    torch.testing.assert_close(exact_mean(model, prompt, 1.0), whole - left_out, rtol=1e-4, atol=2e-6)
    assert left_out.norm() > 0.01


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_one_prompt_share_a_tree_and_keep_their_values(model: GPT2LMHeadModel, packed: bool) -> None:
    """Six rows of two prompts, one of them at two temperatures, against each by itself: values and gradients."""
    completions = [(2, 1, 0), (0, 1), (3, 1, 2, 4), (2, 1, 0), (2, 3, 0), (1, 0)]
    rows = [(PROMPTS[row % 2], completion) for row, completion in enumerate(completions)]
    temperatures = torch.tensor([1.0, 0.5, 1.0, 0.5, 2.0, 0.5])
    points = [
        Points(points_of(completion).decisions, (Determined(1, (0, 3, 1), weight=0.2),)) for completion in completions
    ]
    passed, head = GPT2.sharing(model) if packed else model, model.get_output_embeddings()
    together = score_tree(passed, head, batch_of(rows, 1), points, temperatures)
    for number, row in enumerate(rows):
        alone = score_tree(model, head, batch_of([row]), points[number : number + 1], temperatures[number].item())
        length = len(row[1])
        for name in ("logps", "entropies", "objective"):
            mine, own = getattr(together, name)[number], getattr(alone, name)[0]
            torch.testing.assert_close(mine[:length], own, rtol=1e-5, atol=1e-6)
            assert not mine[length:].any()
        value, own = together.objective[number].sum(), alone.objective.sum()
        torch.testing.assert_close(gradient(value, model), gradient(own, model), rtol=2e-4, atol=1e-5)
    # Row 4 has the prompt of rows 0 and 2, and another temperature; rows 1, 3 and 5 share theirs.


def test_scaling_divides_by_the_deviation_under_the_policy(model: GPT2LMHeadModel) -> None:
    """One right answer of probability p that earns 1: J / (sqrt(p (1 - p)) + least), in the cell of its position."""
    prompt, completion, answer = PROMPTS[0], (0, 2, 1), (2, 4)
    logits = model(input_ids=torch.tensor([[*prompt, 0, 2], [*prompt, 0, 3]])).logits[:, len(prompt) :]
    logps = torch.log_softmax(logits, -1)
    p = (logps[0, 0, 2] + logps[0, 1, 4]).exp().item()
    known = Points((Decision(1, (answer,), (1.0,), weight=3.0),))
    scored = score_tree(model, model.get_output_embeddings(), batch_of([(prompt, completion)]), [known])
    expected = 3.0 * p / ((p * (1 - p)) ** 0.5 + LEAST_DEVIATION)
    assert scored.objective[0].tolist() == pytest.approx([0.0, expected, 0.0], rel=1e-5)
    assert scored.metrics["exact/value"] == (pytest.approx(p, rel=1e-5), 1)
    assert scored.metrics["exact/outside"] == (pytest.approx(1 - p, rel=1e-5), 1)
    # Determined tokens add their log-likelihood.
    beside = Points(known.decisions, (Determined(1, (3, 4), weight=0.5),))
    scored = score_tree(model, model.get_output_embeddings(), batch_of([(prompt, completion)]), [beside])
    expected += 0.5 * (logps[1, 0, 3] + logps[1, 1, 4]).item()
    assert scored.objective[0].tolist() == pytest.approx([0.0, expected, 0.0], rel=1e-5)


def test_rewards_count_from_what_everything_else_earns(model: GPT2LMHeadModel) -> None:
    """A constant added to all rewards, outside included, changes the value by itself and the gradient not at all."""
    prompt, completion = PROMPTS[1], (2, 1, 0)
    values, grads = [], []
    for shift in (0.0, 5.0):
        decision = Decision(0, tuple(FIRST), tuple(r + shift for r in FIRST.values()), otherwise=shift)
        head = model.get_output_embeddings()
        scored = score_tree(model, head, batch_of([(prompt, completion)]), [Points((decision,))])
        values.append(scored.metrics["exact/value"][0])
        grads.append(gradient(scored.objective.sum(), model))
    assert values[1] - values[0] == pytest.approx(5.0, abs=1e-5)
    torch.testing.assert_close(*grads)


def test_actions_that_must_not_be_taken_lose_probability_and_are_in_no_mean(model: GPT2LMHeadModel) -> None:
    """Beside a decision: its metrics stay what they are, and a step uphill makes the unwanted token rarer."""
    prompt, completion = PROMPTS[1], (2, 1, 0)
    taken = Decision(0, tuple(FIRST), tuple(FIRST.values()))
    unwanted = Decision(1, ((4,),), (0.0,), otherwise=1.0)

    def score(*decisions: Decision) -> Any:
        return score_tree(model, model.get_output_embeddings(), batch_of([(prompt, completion)]), [Points(decisions)])

    def logp() -> float:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt)]
        return torch.log_softmax(logits, -1)[4].item()

    alone, both, before = score(taken), score(taken, unwanted), logp()
    for name, (total, count) in alone.metrics.items():
        assert both.metrics[name] == (pytest.approx(total), count)
    score(unwanted).objective.sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * weight.grad if weight.grad is not None else 0.0
    assert logp() < before


@pytest.mark.parametrize(
    ("actions", "rewards", "message"),
    [
        ((), (), "0 actions"),
        (((1,), (2,)), (1.0,), "2 actions and 1 rewards"),
        (((1, 2), (1,)), (1.0, 0.0), r"action \[1\] begins action \[1, 2\]"),
        (((1,), (1,)), (1.0, 0.0), "begins"),
        (((),), (1.0,), "begins"),
    ],
)
def test_impossible_decisions_are_errors(actions: Any, rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decision(0, actions, rewards)


def test_eager_attention_sees_the_same_tree(model: GPT2LMHeadModel) -> None:
    def objective() -> torch.Tensor:
        batch, points = batch_of([(PROMPTS[0], (2, 1, 0))]), [points_of((2, 1, 0))]
        return score_tree(model, model.get_output_embeddings(), batch, points).objective

    expected = objective()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(objective(), expected, rtol=1e-5, atol=1e-6)


def test_exact_part_plus_sampled_rest_is_the_whole_gradient(model: GPT2LMHeadModel) -> None:
    """Two whole completions are enumerated, all others earn something: by enumeration, the mean over samples is right.

    Whatever mean and variance the group had: they are a baseline and a scale.
    """
    prompt = PROMPTS[0]
    completions, logps = plain_logps(model, prompt)
    answers = {(2, 1, 0, 4): 1.0, (1, 1, 3, 0): 0.6}
    torch.manual_seed(0)
    rewards = torch.rand(len(completions)) * 0.5
    for answer, reward in answers.items():
        rewards[completions.index(answer)] = reward
    probs = logps.sum(1).exp()
    wanted = gradient((probs * rewards).sum(), model)
    points = [
        Points(
            (Decision(0, tuple(answers), tuple(answers.values())),),
            rest=Rest(None if c in answers else float(r), mean=0.3, variance=0.02),
        )
        for c, r in zip(completions, rewards, strict=True)
    ]
    head = model.get_output_embeddings()
    scored = score_tree(model, head, batch_of([(prompt, c) for c in completions]), points, scale=False)
    mean = gradient((probs.detach().float() * scored.objective.sum(1)).sum(), model)
    torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=2e-6)
    assert wanted.norm() > 0.01


def test_the_rest_takes_part_in_the_scale(model: GPT2LMHeadModel) -> None:
    """mu = p + (1 - p) m and sigma^2 = p (1 - mu)^2 + (1 - p) (v + (m - mu)^2), by hand."""
    prompt, completion, answer = PROMPTS[0], (0, 2), (3, 0)
    m, v, reward = 0.25, 0.04, 0.4
    logits = model(input_ids=torch.tensor([[*prompt, 3, 2], [*prompt, 0, 2]])).logits[:, len(prompt) - 1 :]
    logps = torch.log_softmax(logits, -1)
    p = (logps[0, 0, 3] + logps[0, 1, 0]).exp().item()
    mu = p + (1 - p) * m
    sigma = (p * (1 - mu) ** 2 + (1 - p) * (v + (m - mu) ** 2)) ** 0.5 + LEAST_DEVIATION
    sample = [logps[1, 0, 0].item(), logps[1, 1, 2].item()]
    known = Points((Decision(0, (answer,), (1.0,)),), rest=Rest(reward, m, v))
    scored = score_tree(model, model.get_output_embeddings(), batch_of([(prompt, completion)]), [known])
    advantage = (reward - mu) / sigma
    expected = [p * (1 - mu) / sigma + advantage * sample[0], advantage * sample[1]]
    assert scored.objective[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_points_of_a_batch() -> None:
    """Groups of two: the first prompt's rest is its one sample that is no action; the second has a plain decision."""

    def find(row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
        decision = {"position": 0, "actions": [[1, 0]], "rewards": [1.0]}
        return {"decisions": [decision], "rest_is_sampled": row["prompt"] == "a"}

    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}]
    completions, rewards = [[1, 0], [2, 0], [1, 0], [3]], [1.0, 0.4, 1.0, -0.3]
    found = points_of_batch(find, rows, completions, rewards, 2, sample_rest=True)
    assert [each["rest"] for each in found] == [
        {"reward": None, "mean": 0.4, "variance": 0.0},
        {"reward": 0.4, "mean": 0.4, "variance": 0.0},
        None,
        None,
    ]
    assert Points.read(found[1]) == Points((Decision(0, ((1, 0),), (1.0,)),), rest=Rest(0.4, 0.4, 0.0))
    found = points_of_batch(find, rows, completions, rewards, 2, sample_rest=False)
    assert all(each["rest"] is None for each in found)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"decisions": [{"position": 0, "actions": [[1], [1, 2]], "rewards": [1, 0]}]}, "begins"),
        ({"decisions": [{"position": 0, "rewards": [1, 0]}]}, "actions"),
        ({"decisions": [{"position": 2, "actions": [[1]], "rewards": [1]}]}, "behind the completion's 2 tokens"),
        ({"decisions": [{"position": 1, "actions": [[1]], "rewards": [1]}], "rest_is_sampled": True}, "at token 0"),
        ({"decisions": [{"position": 0, "actions": [[1]], "rewards": [1], "colour": 3}]}, "colour"),
    ],
)
def test_impossible_points_name_the_row(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"row 0, prompt 'q'.*{message}"):
        points_of_batch(lambda *_: plain, [{"prompt": "q"}], [[1, 2]], [0.0], 1, sample_rest=True)


def test_a_completion_without_tokens_has_no_points() -> None:
    """What is masked (`mask_truncated_completions`) takes no part, and nobody is asked about it."""
    decision = {"position": 0, "actions": [[1]], "rewards": [1.0]}
    asked: list[list[int]] = []

    def find(row: dict[str, Any], completion: Sequence[int]) -> dict[str, Any]:
        asked.append(list(completion))
        return {"decisions": [decision], "rest_is_sampled": True}

    rows, completions = [{"prompt": "a"}] * 3, [[], [1], [2, 3]]
    found = points_of_batch(find, rows, completions, [9.0, 1.0, 0.5], 3, sample_rest=True)
    assert asked == [[1], [2, 3]]
    assert found[0] == {"decisions": [], "determined": [], "rest": None}
    assert found[1]["rest"] == {"reward": None, "mean": 0.5, "variance": 0.0}
    assert points_of_batch(lambda *_: {}, rows, completions, [0.0] * 3, 3, sample_rest=True)[2]["decisions"] == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_without_completion_tokens_has_a_gradient_of_0(model: GPT2LMHeadModel, packed: bool) -> None:
    batch = batch_of([(PROMPTS[0], (2, 1)), (PROMPTS[1], (0,))])
    batch["completion_mask"].zero_()
    passed = GPT2.sharing(model) if packed else model
    scored = score_tree(passed, model.get_output_embeddings(), batch, [Points(), Points()])
    assert scored.objective.tolist() == scored.logps.tolist() == scored.entropies.tolist() == [[0.0, 0.0]] * 2
    assert not gradient(scored.objective.sum() + scored.logps.sum(), model).any()


def test_the_packed_pass_in_half_precision(model: GPT2LMHeadModel) -> None:
    """float16 holds no -1e9: the same objective and gradient up to its rounding, with trees of two sizes."""
    model.float()
    batch = batch_of([(PROMPTS[0], (2, 1, 0, 3)), (PROMPTS[1], (1,))])
    points = [points_of((2, 1, 0, 3)), points_of((1,))]

    def of(half: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            scored = score_tree(GPT2.sharing(model), model.get_output_embeddings(), batch, points)
        return scored.objective.detach(), gradient(scored.objective.sum(), model)

    (objective, wanted), (half_objective, found) = of(False), of(True)
    torch.testing.assert_close(half_objective, objective, rtol=2e-2, atol=2e-3)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
