"""Trees of tokens compute what their rows do one by one: by hand, and against transformers' own padded pass."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling import forest, trees
from rookworld_trl.modeling.forest import per_token_logps
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.modeling.trees import TokenTree, collate, weighted_nats

GPT2Factory = Callable[..., GPT2LMHeadModel]
Rows = list[tuple[list[int], list[int]]]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def pad(rows: Rows, extra: int = 0) -> Batch:
    """Prompts padded on the left, completions on the right, `extra` columns of nothing but padding on each side."""
    prompt_width, completion_width = (max(len(row[side]) for row in rows) + extra for side in (0, 1))
    ids: list[list[list[int]]] = [[], [], [], []]
    for prompt, completion in rows:
        left, right = prompt_width - len(prompt), completion_width - len(completion)
        ids[0].append([0] * left + prompt)
        ids[1].append([0] * left + [1] * len(prompt))
        ids[2].append(completion + [0] * right)
        ids[3].append([1] * len(completion) + [0] * right)
    prompt_ids, prompt_mask, completion_ids, completion_mask = map(torch.tensor, ids)
    return prompt_ids, prompt_mask, completion_ids, completion_mask


def plain(model: GPT2LMHeadModel, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, C) by transformers' own padded forward pass, positions counted by hand."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float() / temperature
    logps = logits[:, prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    chosen = logps.gather(-1, completion_ids[..., None])[..., 0]
    return chosen * completion_mask, entropies * completion_mask


def ragged(seed: int = 5) -> Rows:
    """Groups of 5, 1, 3 and 2; prompts of 1 to 19 tokens, two of one length, one the beginning of another."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 61, (count,), generator=generator).tolist()

    first, long, trunk = tokens(7), tokens(19), tokens(9)
    rows = [(first, tokens(n)) for n in (4, 1, 11, 6)] + [(tokens(1), tokens(3))]
    # Completions that repeat each other: wholly, up to some token, up to the last one, and one that ends earlier.
    rows += [(long, trunk), (long, trunk), (long, trunk[:5] + tokens(6)), (long, [*trunk[:-1], 60]), (long, trunk[:5])]
    rows += [(long[:7], trunk), (tokens(7), tokens(2))]
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[row] for row in order]


BATCHES = {
    "ragged": ragged(),
    "one row": [([5, 6, 7], [8, 9])],
    "one token each": [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([4], [8])],
    "all alike": [([5, 6, 7], [8, 9, 10])] * 4,
    "no two prompts alike": [([5 + row, 6], [7] * (1 + row)) for row in range(5)],
    "a row without tokens": [([5, 6, 7], [8, 9]), ([5, 6, 7], []), ([9], [])],
}


def loss_of(logps: Tensor, entropies: Tensor, weights: Tensor) -> Tensor:
    return (weights * logps).sum() - 0.3 * (weights.flip(1) * entropies).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_values_and_gradients_of_the_padded_forward(make_gpt2: GPT2Factory, rows: Rows, temperature: float) -> None:
    batch = pad(rows, extra=3)
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(1))
    results = []
    for score in (
        lambda model: plain(model, batch, temperature),
        lambda model: per_token_logps(GPT2.sharing(model), *batch, temperature, compute_entropy=True),
    ):
        model = make_gpt2()
        logps, entropies = score(model)
        loss_of(logps, entropies, weights).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((logps.detach(), entropies.detach(), gradients))
    (logps, entropies, gradients), (shared_logps, shared_entropies, shared_gradients) = results
    torch.testing.assert_close(shared_logps, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_entropies, entropies, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        difference = (shared_gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.2g}"


@pytest.mark.parametrize("waste", [None, 0, 10**9], ids=["as it is", "a tile for each shape", "one tile for all"])
def test_variants_of_gpt2_and_of_tiling(
    make_gpt2: GPT2Factory, monkeypatch: pytest.MonkeyPatch, waste: int | None
) -> None:
    if waste is not None:
        monkeypatch.setattr(trees, "TILE_WASTE", 0)
        monkeypatch.setattr(trees, "SMALL_WASTE", waste)
    model = make_gpt2(n_inner=48)
    batch = pad(ragged())
    with torch.no_grad():
        logps, none = per_token_logps(GPT2.sharing(model), *batch)
        torch.testing.assert_close(logps, plain(model, batch, 1.0)[0], rtol=1e-5, atol=1e-5)
    assert none is None


def test_many_logits_are_computed_in_pieces(make_gpt2: GPT2Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pad(ragged())
    gradients = []
    for limit in (2**25, 61 * 7):
        monkeypatch.setattr(forest, "MAX_LOGITS", limit)
        model = make_gpt2()
        logps, entropies = per_token_logps(GPT2.sharing(model), *batch, 0.8, compute_entropy=True)
        loss_of(logps, entropies, torch.ones_like(logps)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_each_distinct_prefix_is_computed_once(make_gpt2: GPT2Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand: prompts of 3 and 1 tokens; nodes 7 8 | 9 | 7 and 5; last tokens predict nothing."""
    rows = [([1, 2, 3], [7, 8, 4]), ([1, 2, 3], [7, 9, 4]), ([1, 2, 3], [7, 8, 4]), ([2], [7, 5, 4])]
    computed: list[int] = []
    original = GPT2.hidden_states

    def counting(self: GPT2, input_ids: Tensor, *rest: object) -> Tensor:
        computed.extend(input_ids.tolist())
        return original(self, input_ids, *rest)

    monkeypatch.setattr(GPT2, "hidden_states", counting)
    with torch.no_grad():
        per_token_logps(GPT2.sharing(make_gpt2()), *pad(rows, extra=2))
    assert sorted(computed) == sorted([1, 2, 3, 2, 7, 8, 9, 7, 5])


def test_masks_with_holes(make_gpt2: GPT2Factory) -> None:
    """Masked tokens in the middle neither count as positions nor are seen, as in the padded forward pass."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = pad([([5, 6, 7], [8, 9, 10]), ([5, 6, 7], [8, 11, 10])])
    prompt_mask[1, 1] = completion_mask[0, 1] = 0
    model = make_gpt2()
    with torch.no_grad():
        logps, _ = per_token_logps(GPT2.sharing(model), prompt_ids, prompt_mask, completion_ids, completion_mask)
        first = model(torch.tensor([[5, 6, 7, 8, 10]])).logits.log_softmax(-1)[0]
        second = model(torch.tensor([[5, 7, 8, 11, 10]])).logits.log_softmax(-1)[0]
    expected = torch.stack(
        [
            torch.stack([first[2, 8], torch.tensor(0.0), first[3, 10]]),
            torch.stack([second[1, 8], second[2, 11], second[3, 10]]),
        ]
    )
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_score_gives_a_differentiable_zero(make_gpt2: GPT2Factory) -> None:
    model = make_gpt2()
    logps, entropies = per_token_logps(GPT2.sharing(model), *pad([([5, 6], []), ([7], [])], extra=2), 1.0, True)
    assert logps.shape == entropies.shape == (2, 2)
    logps.sum().backward()
    assert not logps.any()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_an_empty_prompt_is_refused(make_gpt2: GPT2Factory) -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        per_token_logps(GPT2.sharing(make_gpt2()), *pad([([5, 6], [7]), ([], [7])]))


def test_bf16_autocast(make_gpt2: GPT2Factory) -> None:
    """As near to the float32 values as the padded forward pass is under autocast, up to a factor."""
    model, batch = make_gpt2(std=0.05), pad(ragged())
    with torch.no_grad():
        exact = plain(model, batch, 1.0)[0]
        with torch.autocast("cpu", torch.bfloat16):
            usual = plain(model, batch, 1.0)[0]
            logps, _ = per_token_logps(GPT2.sharing(model), *batch)
    assert logps.dtype == torch.float32
    assert (logps - exact).abs().mean() < 2 * (usual - exact).abs().mean()
    assert (logps - exact).abs().max() < 2 * (usual - exact).abs().max()


def test_the_head_is_float32_under_autocast(make_gpt2: GPT2Factory) -> None:
    """Without layers the head is all that autocast could round: however rows are packed, log-probs are float32's.

    Logits of up to 100, as GPT-2 has: in bf16 they move in steps of 1/2.
    """
    model = make_gpt2(n_layer=0)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(14)
    batch = pad(ragged())
    prompts, ones = [prompt for prompt, _ in ragged()], torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        logits = model(torch.arange(61)[:, None]).logits
        assert 60 < logits.abs().max() < 128
        exact = plain(model, batch, 1.0)[0]
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = per_token_logps(GPT2.sharing(model), *batch)
            sampled = rollout(model, prompts, max_new_tokens=5, eos_token_id=None)
    torch.testing.assert_close(logps, exact, rtol=1e-5, atol=1e-4)
    for prompt, ids, found in zip(prompts, sampled.completion_ids, sampled.logps, strict=True):
        row, kept = torch.tensor([prompt]), torch.tensor([ids])
        with torch.no_grad():
            expected, _ = per_token_logps(GPT2.sharing(model), row, ones.expand_as(row), kept, ones.expand_as(kept))
        torch.testing.assert_close(torch.tensor([found]), expected, rtol=1e-5, atol=1e-4)


# Trees of supervised rows

Row = tuple[list[int], list[int]]

# Two positions: the first with rows that share its tokens, two of them part of the completion too, and one twice.
POSITIONS: list[list[Row]] = [
    [([5, 6, 7, 8], [9, 10, 3]), ([5, 6, 7, 8], [9, 11, 12, 13, 3]), ([5, 6, 7], [20, 3]), ([5, 6, 7], [20, 3])],
    [([5, 6], [30, 31, 32, 33, 34, 3])],
]
SHORT, LONG = [([5, 6], [7, 3])], [([5, 6], [*range(10, 40), 3])]
# Twigs at each place of a long row and of another, as decision points have them; and a tree that branches everywhere.
TWIGS = [
    ([5, 6, 7], [*row[:at], twig, twig + 5, 3])
    for row in (range(10, 26), range(30, 42))
    for at in range(len(row))
    for twig in (50, 51)
]
BUSHY = [([1], [*path, 3]) for path in itertools.product((4, 5), (6, 7), (8, 9), (10, 11))]


def tree_of(rows: list[Row]) -> TokenTree:
    tree = TokenTree()
    for prompt, completion in rows:
        tree.add(prompt, completion)
    return tree


def gradients(model: GPT2LMHeadModel, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss()
    value.backward()
    return value.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_a_tree_by_hand() -> None:
    """1 2 -> 3 4, and 1 2 -> 3 5 6: behind 1 2 3 come 4, learned but no node, and 5, behind which comes 6."""
    tree = tree_of([([1, 2], [3, 4]), ([1, 2], [3, 5, 6])])
    tree.add([1, 7], [8])
    arrays = {name: getattr(value, "tolist", lambda v=value: v)() for name, value in tree.arrays().items()}
    assert arrays == {
        "input_ids": [1, 2, 3, 5, 7],
        "ends": [5, 4, 4, 4, 5],
        "nodes": [1, 2, 2, 3, 4],
        "tokens": [3, 4, 5, 6, 8],
        "weights": [2.0, 1.0, 1.0, 1.0, 1.0],
        "rows": 3,
    }


@pytest.mark.parametrize(
    ("positions", "nodes"),
    [(POSITIONS, 10 + 7), ([SHORT, LONG], 3 + 32), ([TWIGS, BUSHY, SHORT], None)],
    ids=["positions", "one of them padded", "many branches"],
)
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(
    make_gpt2: GPT2Factory, positions: list[list[Row]], nodes: int | None
) -> None:
    model = make_gpt2()
    rows = [row for position in positions for row in position]
    loss, expected = gradients(model, lambda: -plain(model, pad(rows), 1.0)[0].sum())
    batch = collate([tree_of(position).arrays() for position in positions])
    assert batch["rows"].tolist() == [len(position) for position in positions]
    assert nodes is None or batch["size"] == nodes
    assert len(batch["tokens"]) % 16 == 0 <= len(batch["tokens"]) - batch["size"] < 16
    shared, found = gradients(model, lambda: weighted_nats(GPT2.sharing(model), batch))
    assert shared == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_options_are_learned_with_their_shares(tiny_model: GPT2LMHeadModel) -> None:
    """Three moves of shares .5, .3 and .2, two from one square; the first of these two is written."""
    tiny_model.eval()
    options = {(20, 21): 0.3, (20, 22): 0.2, (23, 24): 0.5}
    tree = TokenTree()
    node = tree.choose(options, (20, 21), tree.read([5, 6]), weight=2.0)
    tree.want(node, 3)
    tree.rows = 1

    def logps(ids: list[int]) -> Tensor:
        return tiny_model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    first, second, last = logps([5, 6]), logps([5, 6, 20]), logps([5, 6, 20, 21])
    expected = -2 * (0.5 * first[20] + 0.5 * first[23]) - 2 * (0.6 * second[21] + 0.4 * second[22]) - last[3]
    loss = weighted_nats(GPT2.sharing(tiny_model), collate([tree.arrays()]))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_gives_the_same(make_gpt2: GPT2Factory) -> None:
    """float16 holds no -1e9; beside larger trees the padding of small ones gives no NaN."""
    model = make_gpt2(std=0.05)
    batch = collate([tree_of(position).arrays() for position in [*POSITIONS, TWIGS]])
    expected = gradients(model, lambda: weighted_nats(GPT2.sharing(model), batch))

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return weighted_nats(GPT2.sharing(model), batch)

    found = gradients(model, under_autocast)
    assert found[0] == pytest.approx(expected[0], rel=1e-2)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 0.03 * gradient.norm(), name
