"""The loss of supervised training is the mean over completions, however a step's rows are divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2LMHeadModel

from rookworld_trl.checkpointing.store import verify
from rookworld_trl.modeling.trees import TokenTree
from rookworld_trl.training.supervised import SupervisedConfig, SupervisedTrainer
from tests.support.processes import called

# Tokens of prompt and completion of eight rows: batches of four or of two hold very different numbers of tokens.
LENGTHS = [(3, 1), (5, 2), (2, 1), (4, 1), (3, 30), (6, 24), (2, 28), (4, 31)]


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    dice = torch.Generator().manual_seed(0)
    made = []
    for prompt, completion in LENGTHS:
        ids = torch.randint(3, 40, (prompt + completion,), generator=dice).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def by_hand(checkpoint: Path, rows: list[dict[str, list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, one unpadded row at a time: the mean of the completions' nats, divided by 32."""
    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    total = torch.tensor(0.0)
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total - logps[torch.tensor(row["labels"])[1:] != -100].sum()
    loss = total / len(rows) / 32
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def tree(row: dict[str, list[int]]) -> dict[str, Any]:
    start = sum(label == -100 for label in row["labels"])
    made = TokenTree()
    made.add(row["input_ids"][:start], row["input_ids"][start:])
    return made.arrays()


def step(checkpoint: str, rows: list[dict[str, list[int]]], output: str, options: dict[str, Any]) -> None:
    """One supervised step, alone or under torchrun; what came out goes to a file."""
    plain = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    plain |= {"disable_tqdm": True, "logging_steps": 1, "save_steps": 1, "train_sampling_strategy": "sequential"}
    the_step_is_the_gradient = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    the_step_is_the_gradient |= {"lr_scheduler_type": "constant", "max_steps": 1}
    args = SupervisedConfig(output_dir=f"{output}-run", **plain, **the_step_is_the_gradient, **options)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    data = Dataset.from_list([tree(row) for row in rows])
    trainer = SupervisedTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save({"weights": weights, "loss": trainer.state.log_history[0]["loss"]}, Path(output))


TWO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
CASES = {
    "one batch": (1, {"per_device_train_batch_size": 8}),
    "two batches": (1, TWO),
    "compiled": (1, TWO | {"torch_compile_backend": "eager"}),
    "two batches each": (2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "two processes alone": (2, {"per_device_train_batch_size": 4, "average_tokens_across_devices": False}),
}


@pytest.mark.parametrize(
    "case", [*list(CASES)[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in list(CASES)[2:])]
)
def test_the_loss_is_that_of_one_large_batch(
    tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, rows: list[dict[str, list[int]]], case: str, tmp_path: Path
) -> None:
    processes, settings = CASES[case]
    tiny_model.config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    tiny_model.save_pretrained(tiny_checkpoint)
    loss, gradients = by_hand(tiny_checkpoint, rows)
    arguments = (str(tiny_checkpoint), rows, str(tmp_path / "out"), settings)
    if processes == 1:
        step(*arguments)
    else:
        called(step, *arguments)
    assert verify(tmp_path / "out-run" / "checkpoint-1") == []
    out = torch.load(tmp_path / "out", weights_only=True)
    assert out["loss"] == pytest.approx(loss, rel=1e-4)
    start = tiny_model.state_dict()
    for name, gradient in gradients.items():
        torch.testing.assert_close(start[name] - out["weights"][name], gradient, atol=1e-6, rtol=1e-4)
