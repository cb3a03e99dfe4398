"""Training on the policy's own games: each generation is played by the policy as it is by then, and a run resumes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rookworld_trl.chess import own_games as selfplay
from rookworld_trl.chess.own_games import SelfPlay, SelfPlayOptions
from rookworld_trl.plugins.selfplay_prompts import SelfPlayPrompts
from tests.support.builders import random_gpt2
from tests.support.checkpoint_diff import IGNORED, differences

FEN = "r4rk1/pp3ppp/2n1b3/3p4/3P4/2N1B3/PP3PPP/R4RK1 w - - 0 16"
PROMPTS = [f"P: {FEN}", f"A: {FEN}+a2a3+a2a3+"] * 5  # five batches
OPTIONS = SelfPlayOptions(games=3, plies=6, batches=2, per_opening=9, temperatures=[1.0])


def weights(model: Any) -> str:
    return hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.parameters())).hexdigest()


@pytest.fixture
def players(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights of each generation's player."""
    used: list[str] = []
    player = selfplay.ModelPlayer

    def spied(model: Any, *args: Any, **options: Any) -> Any:
        used.append(weights(model))
        return player(model, *args, **options)

    monkeypatch.setattr(selfplay, "ModelPlayer", spied)
    return used


def build(make_trainer: Any, tokenizer: Any) -> Any:
    columns = {"task": "", "target": "", "legal_moves": ["a2a3"], "legal_cp": [0], "stratum": "", "game": ""}
    rows = [{"prompt": prompt, **columns, "place": place} for place, prompt in enumerate(PROMPTS)]
    model, dataset = random_gpt2(n_positions=320, initializer_range=0.3), Dataset.from_list(rows)
    source = SelfPlay(OPTIONS, dataset, 2, model, tokenizer, max_new_tokens=12, seed=1, values=list)
    seen: list[list[str]] = []

    def letters(completions: list[str], **columns: Any) -> list[float]:
        seen.append(columns["prompts"])
        return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]

    changes: dict[str, Any] = {"learning_rate": 1e-2, "max_completion_length": 12, "shuffle_dataset": False}
    changes |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "rollout_backend": "auto"}
    changes |= {"_model": model, "_reward": letters, "_data": dataset, "_plugins": [SelfPlayPrompts(source)]}
    trainer = make_trainer(**changes)
    trainer.seen = seen
    return trainer


def test_each_generation_is_played_by_the_policy_as_it_is(
    make_trainer: Any, options: dict[str, Any], tiny_tokenizer: Any, players: list[str], tmp_path: Path
) -> None:
    """And a run that goes on from the middle of the first one meets the prompts that it would have met."""
    whole, folder = build(make_trainer, tiny_tokenizer), Path(options["output_dir"])
    start = weights(whole.model)
    whole.train()
    assert len(set(players)) == len(players) == 3
    assert players[0] == start
    saved = [weights(whole.model.from_pretrained(folder / f"checkpoint-{step}")) for step in (2, 4)]
    assert players[1:] == saved, "the policy after two steps, and after four"
    log = [row for row in whole.state.log_history if "loss" in row]
    assert all(row["self_play/share"] > 0 for row in log[:4:2])
    assert {prompt for batch in whole.seen for prompt in batch} - set(PROMPTS)

    (folder / "checkpoint-5").rename(tmp_path / "whole")
    resumed = build(make_trainer, tiny_tokenizer)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert resumed.seen == whole.seen[1:]
    assert players[3:] == saved, "the first generation is not played again"
    assert not differences(tmp_path / "whole", folder / "checkpoint-5", ignore=IGNORED)
