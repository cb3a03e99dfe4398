"""rookworld-nano taught RookWorld's padding: a small model that writes as RookWorld-LM does, and knows a few rows."""

import random
from pathlib import Path
from typing import Any

import torch

from rookworld_trl.chess.dataset import load_shipped
from rookworld_trl.chess.policy import PADDED, policy_completion, respelled
from rookworld_trl.modeling.loading import NANO, load

POSITIONS, STEPS, ROWS = 24, 100, 8


def padded_rows() -> list[dict[str, Any]]:
    """Shipped `P:` rows of train in RookWorld's spelling, which the model knows."""
    rows = (row for row in load_shipped("train").select(range(4 * POSITIONS)) if row["task"] == "policy")
    return [respelled(row, PADDED) for row, _ in zip(rows, range(POSITIONS), strict=False)]


def train_padded_nano(folder: Path) -> Path:
    """A checkpoint in `folder`: supervised training on a few padded rows, lists in any order; 20 s of one core."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model, tokenizer = load(NANO)
    rows = padded_rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    model.train()
    for _ in range(STEPS):
        prompts, answers = [], []
        for row in rng.sample(rows, ROWS):
            answer = policy_completion(row["legal_moves"], row["legal_cp"], rng)
            prompts.append(tokenizer(row["prompt"])["input_ids"])
            text = respelled({**row, "target": answer}, PADDED)["target"]
            answers.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids, labels = torch.zeros(ROWS, width, dtype=torch.long), torch.full((ROWS, width), -100)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[number, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[number, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
