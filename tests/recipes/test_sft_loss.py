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
    args = SupervisedConfig(
        output_dir=f"{output}-run",
        use_cpu=True,
        bf16=False,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",  # the step is the gradient
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        activation_checkpointing=False,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **options,
    )
    trainer = SupervisedTrainer(
        model=GPT2LMHeadModel.from_pretrained(checkpoint),
        args=args,
        train_dataset=Dataset.from_list([tree(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save({"weights": weights, "loss": trainer.state.log_history[0]["loss"]}, Path(output))


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (1, {"per_device_train_batch_size": 8}),
        (1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (
            1,
            {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "average_tokens_across_devices": False,
            },
        ),
        pytest.param(
            1,
            {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "torch_compile_backend": "eager",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"per_device_train_batch_size": 4}, marks=pytest.mark.slow),
        pytest.param(2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(
            2, {"per_device_train_batch_size": 4, "average_tokens_across_devices": False}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "one batch",
        "two batches",
        "two batches alone",
        "compiled",
        "two processes",
        "two batches each",
        "two processes alone",
    ],
)
def test_the_loss_is_that_of_one_large_batch(
    tiny_model: GPT2LMHeadModel,
    tiny_checkpoint: Path,
    rows: list[dict[str, list[int]]],
    processes: int,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
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
