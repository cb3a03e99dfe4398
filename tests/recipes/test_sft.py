"""Supervised training: what is learned from, in which batches, and by which optimizer."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel

from recipes import sft
from recipes.sft import SFTRecipe, average, encode_shard, load_others, load_rows, new_model, uniform_batches
from rookworld_trl.config import RecipeError, parse_recipe
from rookworld_trl.data.generation import POSITION_SCHEMA
from rookworld_trl.data.splits import split_of
from rookworld_trl.data.supervised import supervised_rows
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer
from rookworld_trl.training.supervised import MuonFactory


def test_the_recipe_parses() -> None:
    (recipe,) = parse_recipe((SFTRecipe,), ["--environment_share", "0.3"])
    assert recipe.environment_share == 0.3


def test_a_token_is_hidden_before_anything_could_save_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    words = ["--output_dir", str(tmp_path), "--positions", str(tmp_path), "--hub_token", "hf_abcdefgh12345678"]
    args = []
    monkeypatch.setattr(sft, "set_seed", lambda seed: args.append(sys._getframe(1).f_locals["args"]))
    with pytest.raises(SystemExit):  # there are no positions
        sft.main([*words, "--use_cpu", "true", "--bf16", "false"])
    assert (args[0].hub_token, os.environ["HF_TOKEN"]) == (None, "hf_abcdefgh12345678")


def test_batches_hold_one_task_and_no_row_twice() -> None:
    lengths = [*range(90, 101), *range(170, 188, 2)]
    tasks = ["policy"] * 11 + ["environment"] * 9
    rows = Dataset.from_dict({"task": tasks, "input_ids": [[i] for i in range(20)], "length": lengths})
    ordered = uniform_batches(rows, batch_size=4, seed=0)
    ids = [row[0] for row in ordered["input_ids"]]
    assert len(ids) == len(set(ids)) == 16  # two whole batches of each task
    spans = []
    for tasks_of_batch, lengths_of_batch in zip(
        np.reshape(ordered["task"], (-1, 4)), np.reshape(ordered["length"], (-1, 4)), strict=True
    ):
        assert len(set(tasks_of_batch)) == 1
        spans.append((tasks_of_batch[0], min(lengths_of_batch), max(lengths_of_batch)))
    for (task, _, longest), (other, shortest, _) in itertools.pairwise(sorted(spans)):
        assert task != other or longest < shortest, "within a task the batches are of sorted rows"


def test_a_row_beyond_the_models_positions_is_left_out(tmp_path: Path) -> None:
    """An `L:` row has two tokens a move: five queens make one of more than 256."""
    queens = "1Q3Q1k/4Q3/8/2Q5/8/Q7/8/1K3Q1Q w - - 0 1"
    record = {"history": "", "moves": ["e7f8"], "cp": [9999], "played": "e7f8", "game": 0}
    assert split_of(queens) == "train"
    rows = [record | {"fen": queens}]
    pq.write_table(pa.Table.from_pylist(rows, schema=POSITION_SCHEMA), tmp_path / "positions-00000.parquet")
    recipe = SFTRecipe(positions=str(tmp_path), listing_share=1.0, environment_share=0.0, num_proc=1)
    longest = {}
    for positions in (256, 512):
        recipe.n_positions = positions
        # Half of the L: rows are of the position after a random move.
        for seed in range(6):
            encoded = encode_shard(str(tmp_path / "positions-00000.parquet"), recipe, build_nano_tokenizer(), seed)
            longest[positions] = max(longest.get(positions, 0), *(row["length"] for row in encoded))
    assert longest[256] <= 256 < longest[512]


def test_scarce_moves_give_rows_of_their_own(tmp_path: Path) -> None:
    """Two positions, of which the second offers a mate: with a share of 1 it gives one more `A:` row, of the mate."""
    record = {"history": "", "moves": ["a2a3"], "cp": [0], "played": "a2a3", "game": 0}
    fens = ["6k1/8/8/8/8/8/PPP5/1K6 w - - 0 1", "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1"]
    assert {split_of(fen) for fen in fens} == {"train"}
    path = tmp_path / "positions-00000.parquet"
    pq.write_table(pa.Table.from_pylist([record | {"fen": fen} for fen in fens], schema=POSITION_SCHEMA), path)
    plain = list(supervised_rows([path], 0, environment_share=0.0))
    scarce = list(supervised_rows([path], 0, environment_share=0.0, scarce_share=1.0))
    assert [row["task"] for row in plain] == ["policy", "policy"]
    (extra,) = [row for row in scarce if row not in plain]
    assert "+a1a8+" in extra["prompt"]
    assert extra["completion"].endswith("+1.0+1+0")


def test_positions_in_check_give_more_rows(tmp_path: Path) -> None:
    """A position in check: its `P:` row three times and its evasions as an `L:` row; before a check: those after it."""
    checked, before = "4k3/8/8/8/8/8/4r3/4K3 w - - 0 1", "4k3/8/8/8/8/8/7r/K7 b - - 0 1"
    assert split_of(checked) == split_of(before) == "train"
    record = {"history": "", "moves": ["e1e2"], "cp": [0], "played": "e1e2", "game": 0}
    path = tmp_path / "positions-00000.parquet"
    pq.write_table(
        pa.Table.from_pylist([record | {"fen": fen} for fen in (checked, before)], schema=POSITION_SCHEMA), path
    )
    rows = list(supervised_rows([path], 0, environment_share=0.0, check_share=1.0))
    assert [row["prompt"] for row in rows if row["task"] == "policy"] == [f"P: {checked}"] * 3 + [f"P: {before}"]
    first, second = (row for row in rows if row["task"] == "listing")
    assert (first["prompt"], first["completion"]) == (f"L: {checked}", " M: e1d1 e1e2 e1f1")
    assert second["completion"] in (" M: a1a2 a1b1", " M: a1a2 a1b2")  # after Ra2+ or Rh1+


def test_shards_are_chosen_by_number(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no positions-.* from number 3 on"):
        load_rows(SFTRecipe(positions=str(tmp_path), first_shard=3), build_nano_tokenizer(), 0)


def test_muon_takes_the_block_matrices_and_adamw_the_rest() -> None:
    model: GPT2LMHeadModel = new_model(SFTRecipe(n_layer=1, n_embd=16, n_head=2), build_nano_tokenizer())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = MuonFactory()(model, muon_lr=0.02, adamw_lr=1e-3)
    groups = [(group["use_muon"], {names[id(p)] for p in group["params"]}) for group in optimizer.param_groups]
    h = "transformer.h.0"
    matrices = {f"{h}.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert groups[0] == (True, matrices)
    assert groups[1] == (False, set(names.values()) - matrices)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in matrices)


def test_the_mean_of_three_models(tmp_path: Path) -> None:
    models = [new_model(SFTRecipe(n_layer=1, n_embd=16, n_head=2), build_nano_tokenizer()) for _ in range(3)]
    expected = {k: sum(m.state_dict()[k].double() for m in models) / 3 for k in models[0].state_dict()}
    folders = [str(tmp_path / str(i)) for i in range(3)]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    average(models[0], load_others(models[0], folders[1:]))
    for name, weight in models[0].state_dict().items():
        torch.testing.assert_close(weight.double(), expected[name], atol=1e-6, rtol=0)
    assert models[0].lm_head.weight is models[0].transformer.wte.weight
    wider = new_model(SFTRecipe(n_layer=1, n_embd=32, n_head=2), build_nano_tokenizer())
    with pytest.raises(RecipeError, match=f"average_with: {folders[1]} holds a model of another size"):
        load_others(wider, folders[1:])
