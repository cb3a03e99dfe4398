"""RookWorld's own data and kind of checkpoint through the recipe: padded rows, a padded vocabulary, a leading end."""

import json
from pathlib import Path

import chess
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rookworld_trl.plugins.target_probe import TargetProbe
from rookworld_trl.training import sampler
from tests.recipes.conftest import positions, run
from tests.support.plugged import plugin_of
from tests.support.stockfish import requires_stockfish

RECIPE = Path(__file__).parents[2] / "recipes/rookworld-lm-124m/grpo/config_rookworld_7m.yaml"


@pytest.fixture
def llmc_checkpoint(tiny_checkpoint: Path) -> Path:
    """As llm.c exports: embedding and config padded to a multiple of 128; the padding would win every draw."""
    weights = load_file(tiny_checkpoint / "model.safetensors")
    words = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = torch.cat([words, torch.full((128 - len(words), words.shape[1]), 9.0)])
    save_file(weights, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tiny_checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": 128}))
    return tiny_checkpoint


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Rows as rookworld_7m has them: padded `P:` rows of Black with the worst move as the best, and bare `A:` rows."""
    rows = ["P: nothing"]
    for board in positions(0, 6):
        moves = [move.uci() for move in list(board.legal_moves)[:5]]
        rows.append(f"P: {board.fen():90}M: {' '.join(moves):30}E: {'0.5 0.4 0.3 0.2 0.1':40}B: {moves[4]}")
        after = board.copy()
        after.push_uci(moves[0])
        rows.append(f"{board.fen()}+{moves[0]}+{moves[0]}+{after.fen()}+0.001+0+0")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@requires_stockfish
def test_the_recipe_for_rookworlds_rows_and_checkpoint(
    llmc_checkpoint, texts, arguments, trainers, tmp_path, monkeypatch, capsys
):
    """The shipped recipe on a small file and a small model; what it watches, keeps and controls is as shipped."""
    sampled, rollout = [], sampler.rollout

    def spy(model, prompt_ids, **options):
        sampled.extend(prompt_ids)
        return rollout(model, prompt_ids, **options)

    monkeypatch.setattr(sampler, "rollout", spy)
    small = {"eval_steps": 1, "save_steps": 1, "eval_policy_items": 2, "eval_environment_items": 2, "max_rows": 13}
    small |= {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 1, "expected_parameters": "null"}
    small |= {"engine_cache": tmp_path / "values.sqlite", "engine_nodes": 500, "leading_eos": True}
    del arguments["save_strategy"], arguments["mix_env_ratio"]
    run(arguments | small | {"config": RECIPE, "model": llmc_checkpoint, "dataset": texts})
    shown = capsys.readouterr().out
    for line in ("13 rows read", "6 P: rows kept", "6 A: rows kept", "1 malformed", "6 P: rows valued"):
        assert line in shown
    rows = [row for row in trainers[0].train_dataset if row["task"] == "policy"]
    for row in rows:
        board = chess.Board(row["prompt"][3:])
        assert sorted(row["legal_moves"]) == sorted(move.uci() for move in board.legal_moves)
        assert len(set(row["legal_cp"])) > 5  # guessed ones have six values at most, five of them these rows' own
        whole = row["prompt"] + row["target"]
        assert (whole[93:96], whole[126:129], whole[169:172]) == ("M: ", "E: ", "B: ")
    tokenizer = trainers[0].processing_class
    followed = [tokenizer.decode(ids[:-1]) for _, ids in plugin_of(trainers[0], TargetProbe).pairs]
    assert set(followed) >= {row["target"] for row in rows[:4]}

    # The reference has the words that the policy has, not those of the folder that the config names.
    size = len(tokenizer)
    assert trainers[0].ref_model.config.vocab_size == trainers[0].model.config.vocab_size == size < 128
    assert len(trainers[0].ref_model.get_input_embeddings().weight) == size
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(step["kl"]) < 1e-6
    assert max(step["gates/padding"], step["gates/sampler"]) < 1e-4
    assert sampled
    assert all(ids[0] == tokenizer.eos_token_id for ids in sampled)

    # What is saved is plain, and leads with the end token as it was trained.
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint")
    assert saved("P: a").input_ids[0] == saved.eos_token_id
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").config.vocab_size == size


@pytest.mark.parametrize("spelling", ["null", "padded"])
def test_the_probe_follows_answers_in_the_spelling_that_the_recipe_names(
    spelling, tiny_checkpoint, rows_file, arguments, trainers
):
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for line in lines:
        if line["prompt"].startswith("P"):
            moves = line["legal_moves"][-5:]
            line["target"] = f" M: {' '.join(moves)} E: 0.15 0.16 0.17 0.18 0.19 B: {moves[-1]}"
    rows_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(arguments | {"max_steps": 1, "spelling": spelling})
    tokenizer = trainers[0].processing_class
    answers = {
        tokenizer.decode(prompt): tokenizer.decode(ids[:-1])
        for prompt, ids in plugin_of(trainers[0], TargetProbe).pairs
    }
    for line in (line for line in lines if line["prompt"] in answers and "target" in line):
        fen, moves = line["prompt"][3:], line["legal_moves"][-5:]
        evals = " ".join(str(cp / 100) for cp in line["legal_cp"][-5:])
        padded = f"{fen:90}M: {' '.join(moves):30}E: {evals:40}B: {moves[-1]}"[len(fen) :]
        assert answers[line["prompt"]] == (padded if spelling == "padded" else line["target"])
    assert any(prompt.startswith("P") for prompt in answers)
