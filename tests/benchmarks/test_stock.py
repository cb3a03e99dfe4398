"""Stock TRL's log-probs on padded rows: wrong by what the shift makes, right where nothing is padded or fixed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import ALIKE, shipped
from benchmarks.evidence import stock
from rookworld_trl.modeling.loading import load_model

TEMPERATURE = 0.7


def trainer_of(checkpoint: Path, tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> GRPOTrainer:
    def codes(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text))) for text in completions]

    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2 * len(rows),
        gradient_accumulation_steps=1,
        num_generations=2,
        max_completion_length=6,
        temperature=TEMPERATURE,
        beta=0.01,
        **ALIKE,
    )
    return GRPOTrainer(str(checkpoint), codes, args, Dataset.from_list(rows), processing_class=tokenizer)


def shifted(model: GPT2LMHeadModel, ids: list[int], first: int, keep: int) -> list[float]:
    """Log-probs of the last tokens of one unpadded row whose positions are counted from `first` on."""
    with torch.no_grad():
        positions = torch.arange(first, first + len(ids))[None]
        table = torch.log_softmax(model(torch.tensor([ids]), position_ids=positions).logits[0] / TEMPERATURE, -1)
    return [float(table[place - 1, ids[place]]) for place in range(len(ids) - keep, len(ids))]


def test_errors_are_those_of_shifted_positions(tiny_checkpoint: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A row of each bin, a token a character: without padding TRL is right, with it off by exactly the shift."""
    rows = shipped("dev").select(range(300))
    rows = sorted(rows, key=lambda row: -len(row["prompt"]))
    longest = len(rows[0]["prompt"])
    chosen = [next(row for row in rows if len(row["prompt"]) <= longest - pad) for pad in (0, 4, 20, 41)]
    padded = [longest - len(row["prompt"]) for row in chosen]
    trainer = trainer_of(tiny_checkpoint, tiny_tokenizer, chosen, tmp_path)
    plain = load_model(tiny_checkpoint).eval()
    original, batches = trainer._generate_and_score_completions, []

    def kept(inputs: Any) -> Any:
        batches.append(original(inputs))
        return dict(batches[-1])

    trainer._generate_and_score_completions = kept
    found = stock.measure(trainer, plain, batches=1)
    (batch,) = batches
    errors: dict[int, list[float]] = {pad: [] for pad in padded}
    for prompt, prompt_mask, completion, mask in zip(
        *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        pad, keep = int((prompt_mask == 0).sum()), int(mask.sum())
        ids = [*prompt[pad:].tolist(), *completion[:keep].tolist()]
        wrong, right = shifted(plain, ids, pad, keep), shifted(plain, ids, 0, keep)
        errors[pad] += [abs(a - b) for a, b in zip(wrong, right, strict=True)]
    assert list(found["by_padding"]) == list(stock.PADDING)
    for (name, (low, high)), result in zip(stock.PADDING.items(), found["by_padding"].values(), strict=True):
        (pad,) = (pad for pad in padded if low <= pad <= high)
        for target in ("sampler", "unpadded"):
            assert result[f"with position ids against {target}"]["max"] < 1e-4, name
            error = result[f"stock against {target}"]
            assert error["mean"] == pytest.approx(np.mean(errors[pad]), rel=0.01, abs=1e-5)
            assert error["max"] == pytest.approx(max(errors[pad]), rel=0.01, abs=1e-5)
        assert result["sampler against unpadded"]["max"] < 1e-4  # generate counts from the mask by itself
        assert (result["stock against sampler"]["max"] < 1e-4) == (pad == 0), name
    assert found["old_per_token_logps kept"] is False
    assert found["gradient_cosines"][0] < 0.999
    assert set(found["parsed"]) == {row["task"] for row in chosen}


def test_ratios_and_errors_by_hand() -> None:
    """Stock is off by ln 2 and ln 1.1 up, the fixed side by nothing: ratios 2 and 1.1, of which one leaves 1 +- 0.2."""
    sampler = np.log(np.array([0.2, 0.5]))
    sides = {"stock": sampler + np.log([2.0, 1.1]), "with position ids": sampler, "sampler": sampler}
    found = stock.compared(sides | {"unpadded": sampler}, 0.2)
    assert found["stock against sampler"]["mean"] == pytest.approx((np.log(2) + np.log(1.1)) / 2, rel=1e-2)
    assert found["stock against sampler"]["max"] == pytest.approx(np.log(2), rel=1e-2)
    assert found["with position ids against sampler"] == {"mean": 0.0, "p95": 0.0, "max": 0.0}
    assert found["ratio of stock to sampler"]["median"] == pytest.approx(1.55)
    assert found["ratio of stock to sampler"]["outside 1 +- 0.2"] == 0.5
    assert found["ratio of with position ids to sampler"]["outside 1 +- 0.2"] == 0.0
