"""Takes one supervised step, alone or under torchrun, and writes what came out; see test_sft_loss.py."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2LMHeadModel

from rookworld_trl.checkpointing.exits import close_process_group
from rookworld_trl.training.supervised import SupervisedConfig, SupervisedTrainer


def main(checkpoint: str, rows: str, output: str, options: str) -> None:
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
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_checkpointing=False,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **json.loads(options),
    )
    trainer = SupervisedTrainer(
        model=GPT2LMHeadModel.from_pretrained(checkpoint),
        args=args,
        train_dataset=Dataset.from_list(json.loads(rows)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save({"weights": weights, "loss": trainer.state.log_history[0]["loss"]}, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
