"""The exact gradient on RookWorld's padded rows: it gains, and the model's spelling stays."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rookworld_trl.chess.rewards import REWARDS, ChessPoints
from rookworld_trl.chess.rewards.policy_score import score_policy
from rookworld_trl.modeling.completions import complete
from rookworld_trl.modeling.loading import load
from rookworld_trl.plugins.target_probe import TargetProbe
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer
from tests.support.padded import padded_rows


def sampled(model: Any, tokenizer: Any) -> tuple[float, float, float]:
    """Mean reward, share of legal best moves, share of padded answers, by column 91; six samples of each row."""
    rows = padded_rows() * 6
    settings = {"temperature": 1.0, "max_new_tokens": 120, "batch_size": len(rows), "seed": 1}
    texts = [each.text for each in complete(model, tokenizer, [row["prompt"] for row in rows], **settings)]
    scores = [score_policy(text, row["legal_moves"], row["legal_cp"]) for text, row in zip(texts, rows, strict=True)]
    padded = sum(f"{row['prompt'][3:]}{text}"[88:92].strip(" M:") == "" for text, row in zip(texts, rows, strict=True))
    legal = sum(score.best_legal for score in scores)
    return sum(score.reward for score in scores) / len(rows), legal / len(rows), padded / len(rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_gains_on_padded_rows_and_keeps_their_spelling(padded_checkpoint: Path, options: dict[str, Any]) -> None:
    """Sixty steps of eight prompts. Without decisions in padded answers, the first batch is refused."""
    model, tokenizer = load(padded_checkpoint)
    before = sampled(model, tokenizer)
    settings = {"objective": "exact", "scale_rewards": "group", "num_generations": 2, "beta": 0.0, "seed": 42}
    settings |= {"per_device_train_batch_size": 16, "max_completion_length": 120, "max_steps": 60}
    args = RookWorldGRPOConfig(**{**options, **settings, "learning_rate": 2e-4})
    data = Dataset.from_list(padded_rows())
    probe = TargetProbe()
    more = {"find_points": ChessPoints(tokenizer), "plugins": [probe]}
    trainer = RookWorldGRPOTrainer(model, REWARDS["graduated"], args, data, processing_class=tokenizer, **more)
    trainer.train()
    after = sampled(trainer.model, tokenizer)
    assert after[0] > before[0] + 0.04, (before, after)
    assert after[1] > before[1] + 0.1, (before, after)
    assert after[2] > before[2] - 0.03 > 0.75, (before, after)  # some are a space too long or too short
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert min(row["exact/decided/policy"] for row in log) > 0.7
    assert probe.pairs  # what it follows is in the model's spelling
    assert all(tokenizer.decode(ids[:-1]).startswith("  ") for _, ids in probe.pairs)
