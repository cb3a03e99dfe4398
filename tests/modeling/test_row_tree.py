"""A packed tree computes what its rows compute one by one: by hand, and against transformers' own padded pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling import token_tree
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.row_tree import RowTree, pack, weighted_nats
from rookworld_trl.modeling.token_tree import packed_attention

Row = tuple[list[int], list[int]]

# Two positions: the first with rows that share its tokens, two of them part of the completion too, and one twice.
POSITIONS: list[list[Row]] = [
    [([5, 6, 7, 8], [9, 10, 3]), ([5, 6, 7, 8], [9, 11, 12, 13, 3]), ([5, 6, 7], [20, 3]), ([5, 6, 7], [20, 3])],
    [([5, 6], [30, 31, 32, 33, 34, 3])],
]


def tree_of(rows: list[Row]) -> RowTree:
    tree = RowTree()
    for prompt, completion in rows:
        tree.add(prompt, completion)
    return tree


def padded_nats(model: GPT2LMHeadModel, rows: list[Row]) -> Tensor:
    """The sum over all completions, each row in a line of its own, padded on the right."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, counted = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (prompt, completion) in enumerate(rows):
        ids[number, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[number, : len(prompt) + len(completion)] = 1
        counted[number, len(prompt) : len(prompt) + len(completion)] = 1
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return -(logps.gather(2, ids[:, 1:, None])[..., 0] * counted[:, 1:]).sum()


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


def test_loss_and_gradients_are_those_of_the_rows_one_by_one(tiny_model: GPT2LMHeadModel) -> None:
    tiny_model.eval()
    rows = [row for position in POSITIONS for row in position]
    loss, expected = gradients(tiny_model, lambda: padded_nats(tiny_model, rows))
    batch = pack([tree_of(position).arrays() for position in POSITIONS])
    assert batch["rows"].tolist() == [4, 1]
    assert len(batch["input_ids"]) == 10 + 7 < sum(len(p) + len(c) - 1 for p, c in rows)
    shared, found = gradients(tiny_model, lambda: weighted_nats(GPT2.sharing(tiny_model), batch))
    assert shared == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_what_pads_one_tree_is_seen_by_none(tiny_model: GPT2LMHeadModel) -> None:
    """Beside a longer tree a short one gives the same, and its padding gives no NaN."""
    tiny_model.eval()
    gpt2, short = GPT2.sharing(tiny_model), tree_of([([5, 6], [7, 3])]).arrays()
    long = tree_of([([5, 6], [*range(10, 40), 3])]).arrays()
    alone = [weighted_nats(gpt2, pack([tree])) for tree in (short, long)]
    torch.testing.assert_close(weighted_nats(gpt2, pack([short, long])), sum(alone), rtol=1e-5, atol=1e-5)


def test_options_are_learned_with_their_shares(tiny_model: GPT2LMHeadModel) -> None:
    """Three moves of shares .5, .3 and .2, two from one square; the first of these two is written."""
    tiny_model.eval()
    options = {(20, 21): 0.3, (20, 22): 0.2, (23, 24): 0.5}
    tree = RowTree()
    node = tree.choose(options, (20, 21), tree.read([5, 6]), weight=2.0)
    tree.want(node, 3)
    tree.rows = 1

    def logps(ids: list[int]) -> Tensor:
        return tiny_model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    first, second, last = logps([5, 6]), logps([5, 6, 20]), logps([5, 6, 20, 21])
    expected = -2 * (0.5 * first[20] + 0.5 * first[23]) - 2 * (0.6 * second[21] + 0.4 * second[22]) - last[3]
    loss = weighted_nats(GPT2.sharing(tiny_model), pack([tree.arrays()]))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_gives_the_same(tiny_model: GPT2LMHeadModel) -> None:
    """float16 holds no -1e9; beside a longer tree the padding of a short one sees nothing and still gives no NaN."""
    tiny_model.eval()
    batch = pack([tree_of(position).arrays() for position in POSITIONS])
    expected = gradients(tiny_model, lambda: weighted_nats(GPT2.sharing(tiny_model), batch))

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return weighted_nats(GPT2.sharing(tiny_model), batch)

    found = gradients(tiny_model, under_autocast)
    assert found[0] == pytest.approx(expected[0], rel=1e-2)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_fused_and_plain_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients of three trees of different sizes, padding included."""
    torch.manual_seed(0)
    sizes, heads = (7, 5, 4), 2
    seen = torch.eye(7, dtype=torch.bool).repeat(3, 1, 1)
    for mask, size in zip(seen, sizes, strict=True):
        mask[:size, :size] |= (torch.rand(size, size) < 0.5).tril()
        mask[size:] = False
    slots = torch.cat([torch.arange(size) + 7 * row for row, size in enumerate(sizes)])
    inputs = [torch.randn(sum(sizes), heads, 8, requires_grad=True) for _ in range(3)]
    weights, found = torch.randn(sum(sizes), heads, 8), []
    for fused in (False, True):
        monkeypatch.setattr(token_tree, "fused_pays", lambda _, fused=fused: fused)
        mixed = packed_attention(seen, slots, heads)(0, *inputs, 0.5)
        found.append([mixed, *torch.autograd.grad((mixed * weights).sum(), inputs)])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


def test_scores_as_large_as_half_precision_allows_hide_no_padding() -> None:
    """With queries against keys of thousands below 0, hidden places stay hidden and nothing becomes NaN."""
    seen = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    q, k, v = torch.full((2, 1, 1), 100.0), torch.full((2, 1, 1), -100.0), torch.tensor([[[1.0]], [[3.0]]])
    halves = [x.half().requires_grad_() for x in (q, k, v)]
    mixed = packed_attention(seen, torch.tensor([0, 1]), 1)(0, *halves, 1.0)
    assert mixed.flatten().tolist() == [1.0, 2.0]
    mixed.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in halves if x.grad is not None)
