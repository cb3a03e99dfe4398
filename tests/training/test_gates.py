"""Each gate fails on a fault planted on purpose and passes without: in our trainer, and in TRL's own with four families
of models; without chess."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import GRPOConfig, GRPOTrainer

from rookworld_trl import doctor
from rookworld_trl.doctor import GateCallback
from rookworld_trl.modeling.hooks import Drawn, install_position_hook
from rookworld_trl.training import GateError, RookWorldGRPOTrainer, gates
from rookworld_trl.training.sampler import Samples
from tests.training.conftest import PROMPTS, share_of_letters

MakeOurs = Callable[..., Any]
Make = Callable[..., GRPOTrainer]
FLOAT32 = gates.Bounds.for_precision(mixed=False)

# Ours


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ours_passes_all_of_them(make_trainer: MakeOurs, temperature: float) -> None:
    results = {result.gate: result for result in doctor.examine(make_trainer(temperature=temperature))}
    assert all(result.passed for result in results.values())
    assert set(results) == set(gates.GATES)
    assert results["sampler"].measured < 1e-5
    assert results["reference"].measured == 0


def remove_position_hooks(trainer: RookWorldGRPOTrainer) -> None:
    trainer.model.transformer._forward_pre_hooks.clear()
    trainer.ref_model.transformer._forward_pre_hooks.clear()


def move_reference(trainer: RookWorldGRPOTrainer) -> None:
    with torch.no_grad():
        trainer.ref_model.transformer.wte.weight.mul_(1.05)


def sample_warmer(trainer: RookWorldGRPOTrainer) -> None:
    """The fused head keeps 1.0, the sampler runs at 2.0."""
    trainer.args.temperature = 2.0


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (remove_position_hooks, {"padding", "sampler"}),
        (move_reference, {"reference"}),
        (sample_warmer, {"padding", "temperature", "sampler"}),
    ],
)
def test_a_fault_is_refused_before_any_update(
    make_trainer: MakeOurs, fault: Callable[[Any], None], found: set[str]
) -> None:
    """These are faults of the model's own forward pass; `test_scoring.py` has one of the shared scoring."""
    trainer = make_trainer(learning_rate=1e-2, share_prefixes=False)
    fault(trainer)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(GateError, match=r"gate '\w+' FAILS: measured \S+, bound \S+\. \w+") as caught:
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert {result.gate for result in caught.value.results if not result.passed} == found


@pytest.mark.parametrize("bf16", [False, True])
def test_padding_gate_needs_no_padding_in_the_batch(make_trainer: MakeOurs, bf16: bool) -> None:
    """Prompts of equal length would hide the fault for a batch; the gate adds columns of its own."""
    trainer = make_trainer(share_prefixes=False, bf16=bf16)
    trainer.train_dataset = trainer.train_dataset.select([0, 2, 5, 0, 2, 5, 0, 2])
    remove_position_hooks(trainer)
    with pytest.raises(GateError, match="'padding' FAILS"):
        trainer.train()


def test_nan_and_nothing_recorded_never_pass() -> None:
    assert not gates.GateResult("x", math.nan, 1.0, "").passed
    logps, mask = torch.tensor([[-1.0], [-1.0]]), torch.ones(2, 1)
    for drawn in ([Drawn([math.nan]), Drawn([-1.0])], [None, None]):
        sampled = Samples([[1], [1]], [[2], [2]], drawn)
        assert math.isnan(gates.sampler_gate(sampled, logps, mask, FLOAT32).measured)


def test_reference_gate_by_hand() -> None:
    """k3 at ref - policy = ln 2 is 2 - ln 2 - 1; a masked token does not count."""
    logps, reference = torch.tensor([[-2.0, -1.0]]), torch.tensor([[-2.0 + math.log(2), 50.0]])
    result = gates.reference_gate(logps, reference, torch.tensor([[1, 0]]), FLOAT32)
    assert result.measured == pytest.approx(1 - math.log(2), abs=1e-6)


def test_mixed_precision_measures_the_mean() -> None:
    """One token off by half a nat is a rounding step of bf16; half a nat at every token is not."""
    mixed = gates.Bounds.for_precision(mixed=True)
    deviations = torch.zeros(100)
    deviations[0] = 0.5
    assert FLOAT32.measure(deviations) == 0.5
    assert mixed.measure(deviations) == pytest.approx(0.005)
    assert mixed.measure(deviations) < mixed.logp < mixed.measure(deviations + 0.5)
    assert math.isnan(mixed.measure(torch.tensor([math.nan, 0.0])))
    assert math.isnan(FLOAT32.measure(torch.tensor([0.0, math.nan])))


# TRL's own

ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE |= {"num_key_value_heads": 1, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "qwen2": (Qwen2Config, ROPE),
    "llama": (LlamaConfig, ROPE),
    "gemma2": (Gemma2Config, {**ROPE, "head_dim": 16, "sliding_window": 16}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A random model of each family, with weights large enough that a fault shows."""
    made = {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(tiny_tokenizer, name) for name in names} | {"vocab_size": len(tiny_tokenizer)}
    for family, (config, sizes) in FAMILIES.items():
        torch.manual_seed(1)
        made[family] = tmp_path_factory.mktemp(family)
        model = AutoModelForCausalLM.from_config(config(initializer_range=0.3, **sizes, **tokens))
        model.save_pretrained(made[family])
        tiny_tokenizer.save_pretrained(made[family])
    return made


@pytest.fixture
def make(folders: dict[str, Path], options: dict[str, Any], prompts: Dataset) -> Make:
    """TRL's trainer on a family's model, right but for what `changes` makes wrong; `_model` replaces the folder."""

    def build(family: str, _model: Any = None, **changes: Any) -> GRPOTrainer:
        settings = {"beta": 0.1, "disable_dropout": True, "gradient_checkpointing": False, **options, **changes}
        settings.pop("activation_checkpointing")
        return GRPOTrainer(
            str(folders[family]) if _model is None else _model, share_of_letters, GRPOConfig(**settings), prompts
        )

    return build


def measured(trainer: GRPOTrainer) -> dict[str, gates.GateResult]:
    return {result.gate: result for result in doctor.examine(trainer)}


def failed(trainer: GRPOTrainer) -> set[str]:
    return {gate for gate, result in measured(trainer).items() if not result.passed}


# Right


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_nothing_is_found_in_a_right_set_up(make: Make, family: str) -> None:
    results = measured(make(family, temperature=0.7))
    assert {gate: result.measured for gate, result in results.items() if not result.passed} == {}
    assert set(results) == set(gates.GATES)


def test_gpt2_is_scored_at_shifted_positions_without_the_hook(make: Make) -> None:
    trainer = make("gpt2")
    assert failed(trainer) == {"padding", "sampler"}
    install_position_hook(trainer.model)
    install_position_hook(trainer.ref_model)
    assert failed(trainer) == set()


def test_without_a_reference_the_table_says_so(make: Make) -> None:
    results = doctor.examine(make("qwen2", beta=0.0))
    assert {result.gate for result in results} == set(gates.GATES) - {"reference"}
    assert re.search(r"\nreference +- +- +not measured: there is no reference", doctor.table(results))


# Wrong


def test_dropout_is_found_and_told_from_padding(make: Make) -> None:
    assert failed(make("gpt2", disable_dropout=False)) == {"dropout", "padding", "sampler"}


def test_dropout_by_function_is_found_where_trls_switch_does_not_reach(folders: dict[str, Path], make: Make) -> None:
    """`disable_dropout` sets `nn.Dropout` modules to 0; Llama's attention has none."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], attention_dropout=0.2)
    found = measured(make("llama", model))
    assert not found["dropout"].passed
    assert found["padding"].passed


def test_a_temperature_behind_the_losss_back_is_found(make: Make) -> None:
    results = measured(make("qwen2", generation_kwargs={"temperature": 0.5}))
    assert {gate for gate, result in results.items() if not result.passed} == {"temperature", "sampler"}
    assert "divides logits by 0.5" in results["temperature"].remedy


@pytest.mark.parametrize("setting", [{"top_p": 0.7}, {"repetition_penalty": 1.5}], ids=["top_p", "penalty"])
def test_truncated_sampling_is_found(make: Make, setting: dict[str, Any]) -> None:
    assert failed(make("llama", **setting)) == {"truncation", "sampler"}


def test_truncation_is_the_log_of_the_mass_that_was_kept(make: Make) -> None:
    """With top-k 1 one token of 42 is left, whose log-prob is 0: the bias is its own log-prob."""
    trainer = make("qwen2", top_k=1)
    found = measured(trainer)["truncation"].measured
    ids = trainer.processing_class(PROMPTS)["input_ids"]
    with torch.no_grad():
        likeliest = [trainer.model(torch.tensor([row])).logits[0, -1].log_softmax(-1).max().item() for row in ids]
    assert found >= -max(likeliest)
    assert found > 0.1


def test_settings_tell_where_logits_are_hidden(make: Make) -> None:
    """A sampler such as vLLM returns log-probs alone: exact ones pass, ones that are off fail by as much."""

    def returns_logps(trainer: GRPOTrainer, error: float) -> GRPOTrainer:
        single_turn = trainer._generate_single_turn

        def generate(prompt_ids: list[list[int]], *others: Any) -> Any:
            ids, _ = single_turn(prompt_ids, *others)
            rows = zip(prompt_ids, ids, strict=True)
            with torch.no_grad():
                alone = [gates.score_alone(trainer.model, torch.tensor(p), torch.tensor(c), 1.0) for p, c in rows]
            return ids, [(row + error).tolist() for row in alone]

        trainer._generate_single_turn = generate
        return trainer

    assert failed(returns_logps(make("qwen2"), 0.0)) == set()
    results = measured(returns_logps(make("qwen2", top_p=0.9, generation_kwargs={"min_p": 0.1}), 0.25))
    assert results["sampler"].measured == pytest.approx(0.25, abs=1e-3)
    assert (results["truncation"].measured, results["truncation"].unit) == (2, "settings")
    assert "`top_p=0.9`, `min_p=0.1`" in results["truncation"].remedy


def test_tokens_that_were_encoded_again_are_found(make: Make) -> None:
    trainer = make("gemma2")
    generate = trainer._generate

    def again(prompts: list[str]) -> Any:
        prompt_ids, completion_ids, *rest = generate(prompts)
        return prompt_ids, [[ids[0], *ids] for ids in completion_ids], *rest

    trainer._generate = again
    assert {"sampled_ids"} <= failed(trainer)


def test_a_reference_that_is_not_the_start_is_found(folders: dict[str, Path], make: Make) -> None:
    """TRL reads it again from the name, so a model changed in memory gets the unchanged one."""
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert failed(make("qwen2", model)) == {"reference"}


def test_updates_that_vanish_in_bf16_are_found(make: Make) -> None:
    """At 1e-6 nearly all of them; at 0.1, none of Gaussian weights with a deviation of 0.3."""
    small = measured(make("llama", learning_rate=1e-6, model_init_kwargs={"dtype": "bfloat16"}))
    assert {gate for gate, result in small.items() if not result.passed} == {"weights"}
    assert small["weights"].measured > 0.9
    assert gates.weights_gate(make("llama", model_init_kwargs={"dtype": "bfloat16"}).model, 0.1).measured == 0


def test_the_share_of_lost_updates_by_hand() -> None:
    """Between 1 and 2 bfloat16 has steps of 2**-7: less than half of one is lost, more is not; 0 loses nothing."""
    model = torch.nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    model.weight.data = torch.tensor([[1.5, 1.5, 1.5, 0.0]], dtype=torch.bfloat16)
    assert gates.weights_gate(model, 2**-9).measured == 0.75
    assert gates.weights_gate(model, 2**-7).measured == 0.0
    assert gates.weights_gate(model.requires_grad_(False), 2**-9).measured == 0.0


# The callback


def test_the_callback_stops_stock_trl_before_the_first_update(make: Make) -> None:
    trainer = make("gpt2", learning_rate=1e-2)
    trainer.add_callback(GateCallback(trainer))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(GateError, match=r"gate 'padding' FAILS.*install_position_hook"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_the_callback_lets_a_right_set_up_train_and_goes(make: Make) -> None:
    trainer = make("qwen2", eval_on_start=True, eval_strategy="no")
    trainer.eval_dataset = trainer.train_dataset
    callback = GateCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(result.passed for result in callback.results)
    assert sum("gates/sampler" in row for row in trainer.state.log_history) == 1, "the gates look at one batch"
    assert trainer._generate_and_score_completions.__func__ is GRPOTrainer._generate_and_score_completions


def test_the_callback_can_warn_alone(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make("gpt2", max_steps=1)
    trainer.add_callback(GateCallback(trainer, strict=False))
    trainer.train()
    assert trainer.state.global_step == 1
    assert "FAILS" in capsys.readouterr().out


# The command


@pytest.fixture
def command(folders: dict[str, Path], tmp_path: Path) -> Callable[..., int]:
    """`rookworld-doctor` on a family's model and a file of prompts, as small as a test wants it."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    small = (
        "--use_cpu true --bf16 false --num_generations 4 --max_completion_length 6 --beta 0.1 --disable_dropout true"
    )

    def run(family: str, *words: str) -> int:
        return doctor.main(["--model", str(folders[family]), "--dataset", str(data), *small.split(), *words])

    return run


def test_the_command_writes_what_it_has_found(command: Callable[..., int], tmp_path: Path) -> None:
    """What it prints is in test_doctor.py."""
    assert command("gpt2", "--json", str(tmp_path / "found.json")) == 1
    written = json.loads((tmp_path / "found.json").read_text())
    assert [row["gate"] for row in written] == list(gates.GATES)
    assert {row["gate"] for row in written if row["measured"] > row["bound"]} == {"padding", "sampler"}


def test_the_command_names_what_it_cannot_use(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.csv").write_text("text\nP: a\n")
    for name, error in {
        "texts.csv": "GRPO needs a `prompt` column, this has `text`",
        "none.jsonl": "there is no such file",
        "texts.xlsx": "a .xlsx file is not read here",
    }.items():
        with pytest.raises(SystemExit) as end:
            command("qwen2", "--dataset", str(tmp_path / name))
        assert error in f"{end.value} {capsys.readouterr().err}"
