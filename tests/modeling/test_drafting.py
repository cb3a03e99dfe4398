"""Drafts change nothing but the time: samples, log-probs and greedy choices are those without them."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling import rollout as rollouts
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.rollout import (
    Rollout,
    cumulative_probs,
    draw,
    rising,
    rollout,
    sampling_log_probs,
    verify,
)

GPT2Factory = Callable[..., GPT2LMHeadModel]
EOS = 18


@pytest.fixture
def model(make_gpt2: GPT2Factory) -> GPT2LMHeadModel:
    return make_gpt2(vocab_size=23, seed=1)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 23, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_prompts(3, 12, 5, 9, 1, 12)
SETTINGS = {"max_new_tokens": 14, "eos_token_id": EOS, "num_samples": 12, "seed": 7}


def drafts_of(kind: str, plain: Rollout, greedy: Rollout) -> list[list[int] | None]:
    """Drafts from perfect to absurd."""
    samples = [plain.completion_ids[12 * i] for i in range(6)]
    return {
        "greedy": list[list[int] | None](greedy.completion_ids),
        "one of the samples": list(samples),
        "one token wrong": [[*ids[:3], 22 - ids[3] if len(ids) > 3 else 5, *ids[4:]] for ids in samples],
        "unfinished": [ids[: len(ids) // 2] for ids in samples],
        "too long, with several ends": [[*ids, 4, EOS, 5] * 3 for ids in samples],
        "nonsense": [[1, 2, 3, EOS], [EOS], [22] * 14, [7], [EOS, EOS], [5, EOS]],
        "for some prompts": [samples[0], None, [], samples[3], None, [1]],
    }[kind]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4}, {"temperature": 0}])
@pytest.mark.parametrize(
    "kind",
    [
        "greedy",
        "one of the samples",
        "one token wrong",
        "unfinished",
        "too long, with several ends",
        "nonsense",
        "for some prompts",
    ],
)
def test_samples_are_the_same_with_any_draft(model: GPT2LMHeadModel, kind: str, sampling: dict[str, float]) -> None:
    settings = {**SETTINGS, **sampling}
    plain = rollout(model, PROMPTS, **settings)
    greedy = rollout(model, PROMPTS, **{**SETTINGS, "temperature": 0, "num_samples": 1})
    drafted = rollout(model, PROMPTS, drafts=drafts_of(kind, plain, greedy), **settings)
    assert drafted.completion_ids == plain.completion_ids
    for ours, theirs in zip(drafted.logps, plain.logps, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)
    assert len(set(map(len, plain.completion_ids))) > 5 or sampling.get("temperature") == 0


def test_drafts_save_forward_passes(model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is right takes one pass; rows that leave theirs go on token by token."""
    passed: list[int] = []
    forward = GPT2.hidden_states

    def counted(self: GPT2, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        passed.append(ids.numel())
        return forward(self, ids, *rest)

    monkeypatch.setattr(GPT2, "hidden_states", counted)
    prompt = PROMPTS[1]
    settings = {**SETTINGS, "num_samples": 8, "temperature": 0}
    truth = rollout(model, [prompt], **settings).completion_ids[0]
    assert len(truth) == 14
    assert passed == [12] + [8] * 13  # rows of equal content are not merged
    passed.clear()
    rollout(model, [prompt], drafts=[truth], **settings)
    assert passed == [12 + 14]
    passed.clear()
    wrong = [*truth[:9], (truth[9] + 1) % 22 + 1, *truth[10:]]
    rollout(model, [prompt], drafts=[wrong], **settings)
    assert passed == [12 + 14] + [8] * 4, "nine tokens are followed and one is drawn"


@pytest.mark.parametrize("batch_size", [5, 40])
def test_batches_and_small_memory_change_nothing(
    model: GPT2LMHeadModel, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rollout(model, PROMPTS, **SETTINGS)
    drafts = [plain.completion_ids[12 * i + 1] for i in range(6)]
    whole = rollout(model, PROMPTS, drafts=drafts, **SETTINGS)
    monkeypatch.setattr(rollouts, "LOGITS_AT_ONCE", 2 * 15 * 23)
    assert (
        rollout(model, PROMPTS, drafts=drafts, batch_size=batch_size, **SETTINGS).completion_ids == whole.completion_ids
    )
    assert whole.completion_ids == plain.completion_ids


@pytest.mark.slow
def test_drafts_that_end_beside_drafts_that_are_cut_at_the_real_vocabulary(make_gpt2: GPT2Factory) -> None:
    """GPT-2's 50,257 tokens, so that logits along drafts are computed in several chunks by the real limit."""
    model = make_gpt2(vocab_size=50_257, seed=1)
    with torch.no_grad():  # 60 tokens have all the mass: among 50,257 alike, rounding alone moves a draw to a neighbour
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 4.0
        model.transformer.wte.weight[60:, 0] = -10.0
    prompts = [[1 + (7 * i + j * j) % 59 for j in range(3 + i % 5)] for i in range(40)]
    settings = {"num_samples": 3, "max_new_tokens": 47, "seed": 1}
    endless = rollout(model, prompts, eos_token_id=None, **settings).completion_ids
    seen = Counter(token for ids in endless for token in set(ids))
    end = min(seen, key=lambda token: (abs(seen[token] - 80), token))  # some rows reach it and others do not
    plain = rollout(model, prompts, eos_token_id=end, **settings)
    samples = [plain.completion_ids[3 * i] for i in range(40)]
    drafts = [ids[: len(ids) // 2] if i % 3 == 0 else ids for i, ids in enumerate(samples)]
    assert 10 < sum(ids[-1] == end for ids in drafts) < 30
    longest = max(map(len, drafts)) + 1
    assert rollouts.LOGITS_AT_ONCE // (longest * 50_257) < 30, "one chunk takes all: the test is blind"
    drafted = rollout(model, prompts, drafts=drafts, eos_token_id=end, **settings)
    assert drafted.completion_ids == plain.completion_ids
    for ours, theirs in zip(drafted.logps, plain.logps, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_a_context_that_is_filled_to_the_end(model: GPT2LMHeadModel) -> None:
    """Finished rows stay in their slots for a while; they must not run out of the position table."""
    prompts = random_prompts(50, 49, 50)
    settings = {**SETTINGS, "num_samples": 40}
    plain = rollout(model, prompts, **settings)
    drafts = [plain.completion_ids[40 * i][:13] for i in range(3)]
    assert rollout(model, prompts, drafts=drafts, **settings).completion_ids == plain.completion_ids
    assert max(map(len, plain.completion_ids)) == 14


def test_verify_walks_like_a_row_that_draws_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = (torch.randn(3, 6, 9, generator=generator) * 2).log_softmax(-1)
    log_probs[0, 2, 4:] = -torch.inf
    drafts = torch.randint(9, (3, 5), generator=generator)
    drafts[:, :3] = log_probs[:, :3].argmax(-1)
    drafts[0, 0] = 0
    lengths, nodes = torch.tensor([5, 3, 0]), torch.arange(3).repeat_interleave(100)
    uniforms = torch.rand(300, 6, generator=generator)
    uniforms[::100] = 0.0
    uniforms[1::100] = 1 - 2**-24
    cumulative = cumulative_probs(log_probs)
    accepted, drawn = verify(cumulative, drafts, lengths, nodes, uniforms)
    for row, node in enumerate(nodes.tolist()):
        step = 0
        while True:
            token = int(draw(cumulative[node, step][None], uniforms[row, step][None]))
            if step == lengths[node] or token != drafts[node, step]:
                break
            step += 1
        assert (int(accepted[row]), int(drawn[row])) == (step, token)
        assert log_probs[node, step, token] > -torch.inf
    assert len(set(accepted.tolist())) >= 4


@pytest.mark.parametrize("device", ["crafted", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_that_fall_draw_no_token_of_probability_0(device: str) -> None:
    """A GPU adds in any order: its sums go up and down by their rounding, over tokens of probability 0 too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 500, generator=generator)
    log_probs = sampling_log_probs(logits.masked_fill(logits < logits.topk(40).values[:, -1:], -torch.inf))
    uniforms = torch.rand(200, generator=generator)
    probs, noise = log_probs.exp(), 1 + 1e-6 * torch.randn(200, 500, generator=generator)
    if device == "cuda":
        log_probs, uniforms = log_probs.cuda(), uniforms.cuda()
        sums = cumulative_probs(log_probs)
    else:
        raw = probs.cumsum(-1) * noise
        # Just at each row's sum over some token of probability 0, where rounding decides.
        zero = probs.eq(0).float().multinomial(1, generator=generator)
        uniforms = (raw.gather(1, zero).squeeze(1) / raw[:, -1] - 1e-7).clamp(0, 1 - 2**-24)
        assert log_probs.gather(1, draw(raw, uniforms)[:, None]).eq(-torch.inf).any(), "the test is blind"
        sums = rising(raw, probs)
    drawn = draw(sums, uniforms)
    assert log_probs.gather(1, drawn[:, None]).isfinite().all()
    # A draft of the very token that is drawn is followed, and of the one beside it is not.
    nodes, drafts = torch.arange(200, device=drawn.device), torch.stack([drawn, (drawn + 1) % 500])
    for draft, follows in zip(drafts, (1, 0), strict=True):
        pair, both = sums[:, None].repeat(1, 2, 1), uniforms[:, None].repeat(1, 2)
        accepted, _ = verify(pair, draft[:, None], torch.ones_like(draft), nodes, both)
        assert accepted.eq(follows).all()


def test_bad_drafts_are_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match="1 drafts for 2 prompts"):
        rollout(model, PROMPTS[:2], drafts=[[1]], **SETTINGS)
    with pytest.raises(ValueError, match="draft 1 holds token 23"):
        rollout(model, PROMPTS[:2], drafts=[None, [1, 23]], **SETTINGS)
