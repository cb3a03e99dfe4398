"""Supervised training: what is learned from, in which batches, and by which optimizer."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2LMHeadModel

from recipes import sft
from recipes.making.generation import POSITION_SCHEMA
from recipes.sft import SFTRecipe, load_trees, new_model
from rookworld_trl.modeling.tokenizer import build_nano_tokenizer
from rookworld_trl.settings.parser import RecipeError, parse
from rookworld_trl.training.supervised import MuonFactory


def shard(folder: Path, *fens: str) -> SFTRecipe:
    """A recipe of these positions."""
    record = {"history": "", "moves": ["b1a1"], "cp": [0], "played": "b1a1", "game": 0}
    table = pa.Table.from_pylist([record | {"fen": fen} for fen in fens], schema=POSITION_SCHEMA)
    pq.write_table(table, folder / "positions-00000.parquet")
    return SFTRecipe(positions=str(folder))


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
    shard(tmp_path, "6k1/8/8/8/8/8/PPP5/1K6 w - - 0 1", "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1")
    with pytest.raises(RecipeError, match="holds 2 positions, too few for a step; make more"):
        load_trees(recipe, tokenizer, 2, seed=0)
    assert len(load_trees(recipe, tokenizer, 1, seed=0)[0]) == 3


def test_mirrored_positions_are_shown_too(tmp_path: Path) -> None:
    recipe = shard(tmp_path, "6k1/8/8/8/8/8/PPP5/1K6 w - - 0 1", "6k1/8/8/8/8/8/PPP2P2/1K6 w - - 0 1")
    tokenizer = build_nano_tokenizer()
    plain = load_trees(recipe, tokenizer, 1, seed=0)[0]
    both = load_trees(replace(recipe, mirror=True), tokenizer, 1, seed=0)[0]
    assert len(both) == 2 * len(plain) == 6
    read = [tokenizer.decode(tree["input_ids"])[3:] for i, tree in enumerate(both) if i % 3 < 2]
    assert {text.split(" ")[0] for text in read} == {
        "6k1/8/8/8/8/8/PPP5/1K6",
        "6k1/8/8/8/8/8/PPP2P2/1K6",
        "1k6/ppp5/8/8/8/8/8/6K1",
        "1k6/ppp2p2/8/8/8/8/8/6K1",
    }


def test_a_new_model_has_the_tokenizer_asked_for(tmp_path: Path) -> None:
    """And its squares' names at the start, alike in all three tokens of a square."""
    shard(tmp_path, *(f"6k1/8/8/8/8/8/PPP{n}P{4 - n}/1K6 w - - 0 1" for n in (1, 2, 3)))
    words = ["--positions", str(tmp_path), "--tokenizer", "nano", "--n_layer", "1", "--n_embd", "16", "--n_head", "2"]
    words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3", "--use_cpu", "true"]
    words += ["--bf16", "false", "--report_to", "none", "--output_dir", str(tmp_path / "run")]
    trainer = sft.build(*parse(sft.CLASSES, words))
    tokenizer, weights = trainer.processing_class, trainer.model.transformer.wte.weight
    assert len(weights) == len(tokenizer)
    places = [tokenizer.convert_tokens_to_ids(token) for token in ("⟨e4⟩P", " e4", "e4")]
    assert (weights[places, :8] == weights[places[0], :8]).all()
    first = trainer.train_dataset[0]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(int(first[1])) == "⟨w⟩"


def test_muon_takes_the_block_matrices_and_adamw_the_rest() -> None:
    model: GPT2LMHeadModel = new_model(SFTRecipe(n_layer=1, n_embd=16, n_head=2), build_nano_tokenizer())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = MuonFactory()(model, muon_lr=0.02, adamw_lr=1e-3)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        found[group["use_muon"]] |= {names[id(p)] for p in group["params"]}
    h = "transformer.h.0"
    matrices = {f"{h}.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert found == {True: matrices, False: set(names.values()) - matrices}


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as in Jordan's post: five steps of the quintic, of the matrix with its short side first."""
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def test_muons_factor_counts_outputs_over_inputs() -> None:
    """The square root of max(1, outputs / inputs), by hand, of matrices that GPT-2 stores (in, out); and none of it in
    the decay."""
    factors = {"attn.c_attn": 3**0.5, "attn.c_proj": 1.0, "mlp.c_fc": 2.0, "mlp.c_proj": 1.0}
    model: GPT2LMHeadModel = new_model(SFTRecipe(n_layer=2, n_embd=32, n_head=2), build_nano_tokenizer())
    rate, decay = 0.02, 5.0
    optimizer = MuonFactory()(model, muon_lr=rate, adamw_lr=1e-3, weight_decay=decay)
    assert optimizer.param_groups[0]["lr"] == rate  # the one in the log
    matrices = {
        f"{n}.{name}": model.get_parameter(f"transformer.h.{n}.{name}.weight") for n in (0, 1) for name in factors
    }
    torch.manual_seed(0)
    for matrix in matrices.values():
        matrix.data.normal_()
        matrix.grad = torch.randn_like(matrix)
    before = {name: (matrix.detach().clone(), matrix.grad.clone()) for name, matrix in matrices.items()}
    optimizer.step()
    for name, matrix in matrices.items():
        start, grad = before[name]
        update, wanted = (start * (1 - rate * decay) - matrix.detach()) / rate, orthogonal(grad)
        assert (update * wanted).sum() / wanted.square().sum() == pytest.approx(factors[name[2:]], rel=0.01), name
        assert (update - factors[name[2:]] * wanted).norm() < 0.05 * update.norm(), name
