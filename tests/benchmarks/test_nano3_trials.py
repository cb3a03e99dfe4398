"""The trials differ in what they say they differ in, and an answer's nats are the sum over its tokens."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks import nano3_trials
from benchmarks.common import shipped
from recipes.sft import SFTRecipe, new_model
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer
from rookworld_trl.settings.parser import parse
from rookworld_trl.training.supervised import SupervisedConfig


@pytest.mark.parametrize("name", list(nano3_trials.TRIALS))
def test_a_trial_is_the_recipe_with_one_change(name: str) -> None:
    words = nano3_trials.settings(800) + nano3_trials.TRIALS[name]
    recipe, args = parse((SFTRecipe, SupervisedConfig), [*words, "--output_dir", "runs/trial"])
    assert (recipe.init_from, args.max_steps, args.lr_scheduler_kwargs) == (None, 800, {"num_decay_steps": 200})
    assert (recipe.tokenizer == "nano_side_first") == (name == "side_first")
    assert recipe.mirror == (name == "mirror")


def test_nats_are_an_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a pass over each row alone; batches of two, of rows of unlike length."""
    monkeypatch.setattr(nano3_trials, "BATCH", 2)
    tokenizer = build_nano_tokenizer(side_first=True)
    torch.manual_seed(0)
    model: GPT2LMHeadModel = new_model(SFTRecipe(n_layer=1, n_embd=16, n_head=2), tokenizer).eval()
    rows = [
        row
        for task in ("policy", "environment")
        for row in list(shipped("dev").filter(lambda each, task=task: each["task"] == task).select(range(3)))
    ]
    by_hand: dict[str, float] = {}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*tokenizer(row["prompt"] + row["target"])["input_ids"], tokenizer.eos_token_id]])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        by_hand[row["task"]] = by_hand.get(row["task"], 0.0) - logps.sum().item() / 3
    assert nano3_trials.nats_an_answer(model, tokenizer, rows) == pytest.approx(by_hand, rel=1e-4)
