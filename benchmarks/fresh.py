"""A GPT-2 with random weights and GPT-2's own tokenizer, as a folder: for verification, where the Hub is out of reach.

python -m benchmarks.fresh runs/random-124m
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rookworld_trl.modeling.tokenizer import build_gpt2_tokenizer


def write_fresh(folder: Path, seed: int = 0, **size: int) -> GPT2LMHeadModel:
    """Write a random model and its tokenizer, and return the model.

    Args:
        folder: where to.
        seed: seeds the weights.
        size: fields of `GPT2Config` that differ from GPT-2 small's, whose 124,439,808 parameters are the default.
    """
    tokenizer = build_gpt2_tokenizer()
    torch.manual_seed(seed)
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(**{**special, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **size}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = write_fresh(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: {model.num_parameters():,} parameters, random from seed {arguments.seed}")


if __name__ == "__main__":
    main()
