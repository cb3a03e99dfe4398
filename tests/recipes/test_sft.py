"""Supervised training: what is learned from, in which batches, and by which optimizer."""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2LMHeadModel

from recipes import sft
from recipes.sft import SFTRecipe, load_trees, new_model
from rookworld_trl.config import RecipeError, parse_recipe
from rookworld_trl.data.generation import POSITION_SCHEMA
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer
from rookworld_trl.training.supervised import MuonFactory


def test_the_recipe_parses() -> None:
    (recipe,) = parse_recipe((SFTRecipe,), ["--muon_lr", "0.3"])
    assert recipe.muon_lr == 0.3


def test_a_token_is_hidden_before_anything_could_save_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    words = ["--output_dir", str(tmp_path), "--positions", str(tmp_path), "--hub_token", "hf_abcdefgh12345678"]
    args = []
    monkeypatch.setattr(sft, "set_seed", lambda seed: args.append(sys._getframe(1).f_locals["args"]))
    with pytest.raises(SystemExit):  # there are no positions
        sft.main([*words, "--use_cpu", "true", "--bf16", "false"])
    assert (args[0].hub_token, os.environ["HF_TOKEN"]) == (None, "hf_abcdefgh12345678")


def test_there_must_be_positions_for_a_step(tmp_path: Path) -> None:
    recipe, tokenizer = SFTRecipe(positions=str(tmp_path)), build_nano_tokenizer()
    with pytest.raises(RecipeError, match=r"positions: .* holds no positions-\*\.parquet; make some with"):
        load_trees(recipe, tokenizer, 2, seed=0)
    record = {"history": "", "moves": ["b1a1"], "cp": [0], "played": "a1a2", "game": 0}
    rows = [
        record | {"fen": fen} for fen in ("6k1/8/8/8/8/8/PPP5/1K6 w - - 0 1", "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1")
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=POSITION_SCHEMA), tmp_path / "positions-00000.parquet")
    with pytest.raises(RecipeError, match="holds 2 positions, too few for a step; make more"):
        load_trees(recipe, tokenizer, 2, seed=0)
    assert len(load_trees(recipe, tokenizer, 1, seed=0)[0]) == 3


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
