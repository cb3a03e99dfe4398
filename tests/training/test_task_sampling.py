"""Two tasks sampled differently in one batch, each scored at what it was sampled at; drafts that change no sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel

from rookworld_trl.modeling.forest import per_token_logps
from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.training import GateError, RookWorldGRPOTrainer, gates, sampler

Make = Callable[..., RookWorldGRPOTrainer]

COOL = {"A": {"temperature": 0.5, "max_completion_length": 3}, "P": {"temperature": 1.5}}
ROWS = [
    {"prompt": "P: a", "task": "P", "target": "b"},
    {"prompt": "A: 1234567890", "task": "A", "target": "ab"},
    {"prompt": "P: abcdefgh", "task": "P", "target": "h"},
    {"prompt": "A: e", "task": "A", "target": "e"},
]


@pytest.fixture
def make(make_trainer: Make) -> Make:
    """A trainer on two prompts of each task, all in every batch."""
    settings = {"per_device_train_batch_size": 16, "target_task": "A", "task_sampling": COOL, "beta": 0.1}
    settings |= {"_data": Dataset.from_list(ROWS), "rollout_backend": "auto"}
    return lambda **changes: make_trainer(**settings | changes)


def batch_of(trainer: RookWorldGRPOTrainer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = list(next(iter(trainer.get_train_dataloader())))
    return inputs, trainer._generate_and_score_completions(inputs)


def alone(model: Any, batch: dict[str, Any], row: int, temperature: float) -> torch.Tensor:
    """Log-probs of a completion, by the plain forward pass over the row without padding."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    return gates.score_alone(model, prompt, completion, temperature)


@pytest.mark.parametrize("backend", ["native", "transformers"])
@pytest.mark.parametrize("share", [True, False])
def test_rows_are_sampled_and_scored_at_their_own_temperature(make: Make, backend: str, share: bool) -> None:
    """Sampling, reference and loss, against each row alone; and no `A` completion is longer than its limit."""
    trainer = make(rollout_backend=backend, share_prefixes=share)
    inputs, batch = batch_of(trainer)
    temperatures = [COOL[row["task"]]["temperature"] for row in inputs]
    assert batch["temperatures"].tolist() == temperatures
    assert set(temperatures) == {0.5, 1.5}
    lengths = batch["completion_mask"].sum(1).tolist()
    assert max(n for n, row in zip(lengths, inputs, strict=True) if row["task"] == "A") <= 3
    assert max(n for n, row in zip(lengths, inputs, strict=True) if row["task"] == "P") > 3
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        keep = batch["completion_ids"].shape[1]
        logps = trainer.scorer(trainer.model, ids, mask, keep, temperatures=batch["temperatures"], batch_size=5)[0]
    for row, temperature in enumerate(temperatures):
        with torch.no_grad():
            expected = alone(trainer.model, batch, row, temperature)
        for found in (logps, batch["ref_per_token_logps"]):
            assert torch.allclose(found[row, : len(expected)], expected, atol=1e-5)
        if backend == "native":
            assert torch.allclose(batch["sampling_per_token_logps"][row, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_loss_and_kl_use_the_rows_temperatures(make: Make, share: bool) -> None:
    """The gradient, by hand: advantages times log-probs, and the KL, of rows scored one by one."""
    trainer = make(share_prefixes=share, loss_type="grpo", beta=0.3)
    _, batch = batch_of(trainer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    trainer.model.zero_grad()
    total = torch.zeros(())
    for row, temperature in enumerate(batch["temperatures"].tolist()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        policy, reference = (
            (model(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            for model in (trainer.model, trainer.ref_model)
        )
        logps, ref_logps = (table.gather(-1, completion[:, None])[:, 0] for table in (policy, reference))
        kl = (logps - ref_logps).detach() * logps  # the corrected k3: its gradient is the log-ratio times the policy's
        ratio = (logps - logps.detach()).exp()
        total = total + (-ratio * batch["advantages"][row] + 0.3 * kl).mean()
    (total / len(batch["temperatures"])).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_rows_of_one_prompt_may_have_different_temperatures(policy: GPT2LMHeadModel) -> None:
    rows = torch.tensor([[5, 6], [5, 6]])
    ones, temperatures = torch.ones_like(rows), torch.tensor([0.5, 1.0])
    with torch.no_grad():
        found, _ = per_token_logps(GPT2.sharing(policy), rows, ones, rows, ones, temperatures)
        logits = policy.eval()(torch.tensor([[5, 6, 5, 6]])).logits[0, 1:-1]
    expected = [(logits / each).log_softmax(-1)[range(2), [5, 6]] for each in temperatures]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_a_run_passes_the_gates(make: Make, backend: str) -> None:
    trainer = make(rollout_backend=backend, learning_rate=1e-2, num_iterations=2, max_steps=3)
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert log[1]["kl"] > 1e-6


def test_the_gates_see_a_row_scored_at_anothers_temperature(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(rollout_backend="native")

    score = trainer.scorer._score
    monkeypatch.setattr(trainer.scorer, "_score", lambda model, _, *args, **more: score(model, None, *args, **more))
    with pytest.raises(GateError, match="gate 'sampler' FAILS") as caught:
        trainer.train()
    assert {each.gate for each in caught.value.results if not each.passed} == {"padding", "temperature", "sampler"}


def test_drafts_change_no_sample(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`A` rows draft their truth with its end token, others nothing; samples are those drawn without drafts."""
    seen: list[Any] = []
    original = sampler.rollout

    def watched(model: Any, prompt_ids: Any, *, drafts: Any, **settings: Any) -> Any:
        seen.append({tuple(ids): draft for ids, draft in zip(prompt_ids, drafts, strict=True)})
        return original(model, prompt_ids, drafts=drafts, **settings)

    monkeypatch.setattr(sampler, "rollout", watched)
    batches = []
    for drafted in (False, True):
        target = {} if drafted else {"target_task": "none of them"}
        trainer = make(rollout_backend="native", task_sampling=None, **target)
        batches.append(batch_of(trainer)[1])
    assert torch.equal(batches[0]["completion_ids"], batches[1]["completion_ids"])
    assert torch.allclose(batches[0]["sampling_per_token_logps"], batches[1]["sampling_per_token_logps"], atol=1e-5)
    assert set(seen[0].values()) == {None}
    encode, eos = trainer.processing_class, trainer.processing_class.eos_token_id
    drafts = {row["prompt"]: (*encode(row["target"])["input_ids"], eos) for row in ROWS if row["task"] == "A"}
    assert seen[1] == {tuple(encode(row["prompt"])["input_ids"]): drafts.get(row["prompt"]) for row in ROWS}
