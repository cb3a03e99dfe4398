"""What scorers read of a completion: nothing that was sampled is hidden from them, in training or in evaluation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from rookworld_trl.chess import rewards
from rookworld_trl.chess.accuracy import evaluate
from rookworld_trl.chess.rewards.moves import UNPARSABLE
from rookworld_trl.modeling import completions
from rookworld_trl.modeling.completions import CUT_OFF, completion_texts
from rookworld_trl.training import RookWorldGRPOConfig, RookWorldGRPOTrainer

FAULTS = ["no end token", "pad", "unknown", "a second end token"]


def spoil(ids: list[int], fault: str, tokenizer: Any) -> list[int]:
    """A right completion's ids, its end token included, made wrong by special tokens alone."""
    middle = len(ids) // 2
    return {
        "none": ids,
        "no end token": ids[:-1],
        "pad": [*ids[:middle], tokenizer.pad_token_id, *ids[middle:]],
        "unknown": [*ids[:-1], tokenizer.unk_token_id, ids[-1]],
        "a second end token": [tokenizer.eos_token_id, *ids],
    }[fault]


@pytest.fixture
def spoiled(rows: list[dict[str, Any]], gold: list[str], tiny_tokenizer: Any, fault: str) -> list[list[int]]:
    endings = [[*ids, tiny_tokenizer.eos_token_id] for ids in tiny_tokenizer(gold)["input_ids"]]
    return [spoil(ids, fault, tiny_tokenizer) for ids in endings]


def test_texts_by_hand(tiny_tokenizer: Any) -> None:
    pad, eos, unk, a, b = tiny_tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>", "a", "b"])
    given = [[a, b, eos], [a, pad, b, eos], [unk, eos], [eos], [a, b], [], [a, pad]]
    expected = ["ab", "a<pad>b", "<unk>", "", "ab" + CUT_OFF, CUT_OFF, "a<pad>" + CUT_OFF]
    assert completion_texts(tiny_tokenizer, given) == expected
    assert completion_texts(tiny_tokenizer, [[a, pad], [a, b]], [eos, pad]) == ["a", "ab" + CUT_OFF]


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_in_training(
    rows: list[dict[str, Any]],
    spoiled: list[list[int]],
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    fault: str,
) -> None:
    trainer = RookWorldGRPOTrainer(
        tiny_model,
        [rewards.policy_reward, rewards.environment_reward],
        RookWorldGRPOConfig(str(tmp_path), use_cpu=True, num_generations=2, beta=0.0, report_to="none"),
        Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
    )
    prompts = [row["prompt"] for row in rows] * 2
    clean = tiny_tokenizer.batch_decode(spoiled * 2, skip_special_tokens=True)  # what TRL hands on
    found = trainer._calculate_rewards(rows * 2, prompts, clean, spoiled * 2)
    expected = 1.0 if fault == "none" else UNPARSABLE
    assert found.nansum(1).tolist() == pytest.approx([expected] * len(prompts))


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_in_evaluation(
    rows: list[dict[str, Any]],
    spoiled: list[list[int]],
    tiny_model: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    by_prompt = dict(zip((row["prompt"] for row in rows), spoiled, strict=True))

    def rollout(model: torch.nn.Module, prompt_ids: list[list[int]], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(completion_ids=[by_prompt[tiny_tokenizer.decode(ids)] for ids in prompt_ids])

    monkeypatch.setattr(completions, "rollout", rollout)
    results = evaluate(tiny_model, tiny_tokenizer, rows, modes=["greedy"], max_new_tokens=99)
    items = [item for result in results for item in result.items]
    assert [item.scores["parsed"] for item in items] == [float(fault == "none")] * len(rows)
    assert [item.scores["reward"] for item in items] == [1.0 if fault == "none" else UNPARSABLE] * len(rows)
