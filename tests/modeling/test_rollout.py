"""Native rollouts: the distribution is the model's, the log-probs are exact, rows are independent of their batch."""

from collections import Counter
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.rollout import rollout

GPT2Factory = Callable[..., GPT2LMHeadModel]
EOS = 0


@pytest.fixture
def model(make_gpt2: GPT2Factory) -> GPT2LMHeadModel:
    return make_gpt2()


def random_prompts(*lengths: int, vocab_size: int = 61, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def probs_by_hand(logits: list[float], temperature: float) -> np.ndarray:
    weights = np.exp(np.array(logits, dtype=np.float64) / temperature)
    return weights / weights.sum()


def scores(model: GPT2LMHeadModel, prompt: list[int], completion: list[int]) -> Tensor:
    """transformers' logits (len(completion), V) at the completion's tokens, one row alone, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_log_probs_are_those_of_a_full_forward(model: GPT2LMHeadModel, temperature: float) -> None:
    prompts = random_prompts(3, 17, 5, 9, 1)
    out = rollout(model, prompts, num_samples=4, max_new_tokens=20, eos_token_id=EOS, temperature=temperature)
    assert len(out.completion_ids) == len(out.logps) == 20
    for row, (completion, logps) in enumerate(zip(out.completion_ids, out.logps, strict=True)):
        logits = scores(model, prompts[row // 4], completion).tolist()
        for token, logp, at in zip(completion, logps, logits, strict=True):
            assert abs(np.log(probs_by_hand(at, temperature)[token]) - logp) < 1e-4


def test_a_completion_ends_with_its_first_end_token_or_at_the_limit(model: GPT2LMHeadModel) -> None:
    out = rollout(model, random_prompts(3, 8), num_samples=64, max_new_tokens=10, eos_token_id=EOS)
    ended = [ids for ids in out.completion_ids if ids[-1] == EOS]
    assert 10 < len(ended) < 120, "both kinds must occur, or the test is blind"
    assert all(EOS not in ids[:-1] for ids in out.completion_ids)
    assert all(len(ids) == 10 for ids in out.completion_ids if ids[-1] != EOS)
    assert len({len(ids) for ids in ended}) > 3
    endless = rollout(model, random_prompts(3, 8), num_samples=64, max_new_tokens=10, eos_token_id=None)
    assert all(len(ids) == 10 for ids in endless.completion_ids)
    for short, long in zip(out.completion_ids, endless.completion_ids, strict=True):
        assert long[: len(short)] == short, "finishing rows changed the others"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_is_identical_to_generate(make_gpt2: GPT2Factory, attention: str) -> None:
    model = make_gpt2(attn_implementation=attention)
    prompts = random_prompts(3, 9, 5, 9, 1, 19, 1, 4, 8)

    def generate(prompt: list[int], eos: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask, settings = torch.ones_like(ids), {"do_sample": False, "max_new_tokens": 30, "eos_token_id": eos}
        return model.generate(ids, attention_mask=mask, **settings)[0, len(prompt) :].tolist()

    # An end token that some rows reach, early or late, and others never.
    endless = [generate(prompt, 999) for prompt in prompts]
    eos = max(range(61), key=lambda token: len({ids.index(token) if token in ids else -1 for ids in endless}))
    out = rollout(model, prompts, max_new_tokens=30, eos_token_id=eos, temperature=0)
    assert out.completion_ids == [generate(prompt, eos) for prompt in prompts]
    assert len(set(map(len, out.completion_ids))) >= 4, "rows must end at different lengths, or the test is blind"
    for prompt, completion, logps in zip(prompts, out.completion_ids, out.logps, strict=True):
        best = scores(model, prompt, completion).log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(logps), best, atol=1e-4, rtol=0)


def chi_square(counts: Counter[tuple[int, ...]], probs: dict[tuple[int, ...], float], total: int) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells expecting fewer than 8 are pooled."""
    statistic, pooled_seen, pooled_expected, cells = 0.0, 0, 0.0, 0
    for outcome, prob in probs.items():
        if prob * total < 8:
            pooled_seen, pooled_expected = pooled_seen + counts[outcome], pooled_expected + prob * total
            continue
        statistic += (counts[outcome] - prob * total) ** 2 / (prob * total)
        cells += 1
    if pooled_expected > 0:
        statistic += (pooled_seen - pooled_expected) ** 2 / max(pooled_expected, 1e-9)
        cells += 1
    return statistic, cells - 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_exact_distribution(make_gpt2: GPT2Factory, temperature: float) -> None:
    """Every completion of up to 3 tokens over 5, enumerated with transformers' logits; then Pearson's chi-square."""
    model = make_gpt2(seed=2, vocab_size=5, n_positions=8)
    prompt, total = [3, 1, 4], 8_000
    probs: dict[tuple[int, ...], float] = {}
    for ids in product(range(5), repeat=3):
        logits = scores(model, prompt, list(ids)).tolist()
        stop = ids.index(EOS) + 1 if EOS in ids else 3
        steps = [probs_by_hand(at, temperature)[i] for at, i in zip(logits, ids, strict=True)]
        probs[ids[:stop]] = float(np.prod(steps[:stop]))
    assert abs(sum(probs.values()) - 1) < 1e-9
    out = rollout(
        model,
        [prompt],
        num_samples=total,
        max_new_tokens=3,
        eos_token_id=EOS,
        temperature=temperature,
        seed=11,
    )
    counts = Counter(map(tuple, out.completion_ids))
    assert all(probs[ids] > 0 for ids in counts)
    statistic, freedom = chi_square(counts, probs, total)
    assert freedom >= 4
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)  # 4 standard deviations


def test_a_sample_does_not_depend_on_its_batch(model: GPT2LMHeadModel) -> None:
    prompts = random_prompts(3, 17, 5, 9, 1, 30)
    settings = {"num_samples": 6, "max_new_tokens": 15, "eos_token_id": EOS, "seed": 4}
    together = rollout(model, prompts, **settings)
    for i, prompt in enumerate(prompts):
        assert rollout(model, [prompt], **settings).completion_ids == together.completion_ids[6 * i : 6 * i + 6]
    assert rollout(model, prompts, batch_size=4, **settings).completion_ids == together.completion_ids
    assert rollout(model, prompts, batch_size=13, **settings).completion_ids == together.completion_ids
    backwards = rollout(model, prompts[::-1], **settings).completion_ids
    assert [backwards[6 * (5 - i) + j] for i in range(6) for j in range(6)] == together.completion_ids
    assert rollout(model, prompts, **{**settings, "seed": 5}).completion_ids != together.completion_ids


def test_repeated_prompts_are_samples_of_one_prompt(model: GPT2LMHeadModel) -> None:
    a, b = random_prompts(4, 7)
    grouped = rollout(model, [a, b], num_samples=4, max_new_tokens=10, eos_token_id=EOS)
    listed = rollout(model, [a, b, a, b, a, a, b, b], max_new_tokens=10, eos_token_id=EOS)
    assert [listed.completion_ids[i] for i in (0, 2, 4, 5)] == grouped.completion_ids[:4]
    assert [listed.completion_ids[i] for i in (1, 3, 6, 7)] == grouped.completion_ids[4:]
    assert len(set(map(tuple, grouped.completion_ids[:4]))) == 4


def test_a_sample_does_not_depend_on_how_many_there_are_or_how_long_they_may_get(model: GPT2LMHeadModel) -> None:
    prompts = random_prompts(4, 7)
    few = rollout(model, prompts, num_samples=2, max_new_tokens=6, eos_token_id=None)
    many = rollout(model, prompts, num_samples=9, max_new_tokens=25, eos_token_id=None)
    for prompt, sample in product(range(2), range(2)):
        assert many.completion_ids[9 * prompt + sample][:6] == few.completion_ids[2 * prompt + sample]


def test_mode_gradients_and_parameters_are_left_alone(make_gpt2: GPT2Factory) -> None:
    model = make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    prompts, settings = random_prompts(4, 7), {"num_samples": 4, "max_new_tokens": 10, "eos_token_id": EOS}
    evaluated = rollout(model, prompts, **settings)
    model.train()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    trained = rollout(model, prompts, **settings)
    assert trained == evaluated
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()), "the global random state belongs to training"


def test_autocast_is_followed_and_does_not_cut_the_next_gradient(model: GPT2LMHeadModel) -> None:
    prompts = random_prompts(4, 7)
    exact = rollout(model, prompts, num_samples=8, max_new_tokens=10, eos_token_id=EOS)
    with torch.autocast("cpu", torch.bfloat16):
        low = rollout(model, prompts, num_samples=8, max_new_tokens=10, eos_token_id=EOS)
        for row, (completion, logps) in enumerate(zip(low.completion_ids, low.logps, strict=True)):
            logits = scores(model, prompts[row // 8], completion).float()
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(logps), expected, atol=0.1, rtol=0)
        model(torch.tensor(prompts[:1])).logits.float().square().sum().backward()
    assert exact.logps != low.logps
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, f"no gradient for {missing}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 60}, "prompt 1 has 5 tokens: the context leaves room for 1 to 4"),
        ({"prompt_ids": [[1], []]}, "prompt 1 has 0 tokens"),
        ({"prompt_ids": [[1], [61]]}, "prompt 1 holds token 61"),
    ],
)
def test_bad_requests_are_refused_by_name(model: GPT2LMHeadModel, changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"prompt_ids": random_prompts(3, 5), "max_new_tokens": 5, "eos_token_id": EOS}
    with pytest.raises(ValueError, match=message):
        rollout(model, **{**settings, **changes})


def test_no_prompts_no_completions(model: GPT2LMHeadModel) -> None:
    assert rollout(model, [], max_new_tokens=5, eos_token_id=EOS).completion_ids == []
