"""What this package leans on inside TRL, pinned. A failure here names the seam an upgrade has moved."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from tests.support.documents import ROOT

Make = Callable[..., GRPOTrainer]

SIGNATURES = {
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate_and_score_completions": "inputs",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_compute_loss": "model inputs",
    "training_step": "model inputs num_items_in_batch",
    "_get_grad_norm": "model grad_norm",
    "create_scheduler": "num_training_steps optimizer",
    "_save_checkpoint": "model trial",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_get_output_dir": "trial",
    "_push_from_checkpoint": "checkpoint_folder",
    "init_hf_repo": "token private",
    "create_model_card": "model_name dataset_name tags",
    "save_model": "output_dir _internal_call",
    "_issue_warnings_after_load": "load_result",
    "_get_train_sampler": "dataset",
    "_tokenize_prompts": "prompts",
    "_log_completion_extra": "column values",
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep",
}


def test_signatures() -> None:
    for seam, names in SIGNATURES.items():
        method = getattr(GRPOTrainer, seam, None)
        assert method is not None, f"TRL seam GRPOTrainer.{seam} is gone"
        expected, parameters = ["self", *names.split()], inspect.signature(method).parameters
        actual = list(parameters)
        assert actual[: len(expected)] == expected, f"TRL seam GRPOTrainer.{seam} takes {actual}, not {expected}"
        required = [each for each in parameters.values() if each.default is each.empty]
        assert len(required) <= len(expected), f"TRL seam GRPOTrainer.{seam} requires new arguments: {required}"


ATTRIBUTES = (
    *("temperature", "max_completion_length", "eos_token_ids", "beta", "ref_model", "_metrics", "_logs", "_step"),
    *("_buffered_inputs", "_entropy_window_stats", "num_iterations", "reward_func_names", "reward_weights"),
    *("reward_funcs", "generation_config", "_pending_metrics", "_pending_extra_logs"),
)


def test_attributes_and_what_is_read_at_once(make_stock: Make) -> None:
    """Seams `_tokenize_prompts`: ids without padding, no images, no fields beside them; `_metrics`: averaged into the
    next log; `_get_train_sampler`: a `RepeatSampler` that is rebuilt from its attributes."""
    trainer = make_stock()
    gone = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    assert not gone, f"TRL attributes GRPOTrainer.{gone} are gone"
    expected = [trainer.processing_class(text)["input_ids"] for text in ("P: a", "A: h1h2")]
    assert trainer._tokenize_prompts(["P: a", "A: h1h2"]) == (expected, None, {}), "seam _tokenize_prompts"
    trainer.model.train()
    trainer._metrics["train"]["ours"].extend([1.0, 3.0])
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["ours"] == 2.0, "seam _metrics: not averaged into logs"
    sampler = trainer._get_train_sampler()
    assert type(sampler) is RepeatSampler, "seam _get_train_sampler: another class"
    names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
    again = RepeatSampler(**{name: getattr(sampler, name) for name in names})
    assert list(again) == list(sampler), "seam RepeatSampler: other attributes"


def test_generate_single_turn_decides_ids_and_logps_of_the_batch(make_stock: Make) -> None:
    """Seam `_generate_single_turn`: gets prompts already repeated, and what it returns enters the batch untouched."""
    trainer = make_stock()
    trainer.model.train()
    seen: list[Any] = []

    def fixed(prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], list[list[float]]]:
        seen.extend(prompt_ids)
        return [[5, 6 + row] for row in range(len(prompt_ids))], [[-1.0, -0.5 * row] for row in range(len(prompt_ids))]

    trainer._generate_single_turn = fixed
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    runs = [seen[start : start + 4] for start in (0, 4)]
    assert all(prompt == run[0] for run in runs for prompt in run), "seam _generate_single_turn: prompts not repeated"
    assert batch["completion_ids"].tolist() == [[5, 6 + row] for row in range(8)], "seam: ids changed on the way"
    assert batch["sampling_per_token_logps"].tolist() == [[-1.0, -0.5 * row] for row in range(8)], "seam: logps lost"


def test_generate_and_score_completions_keys(make_stock: Make) -> None:
    """Seam `_generate_and_score_completions`: the keys that the gates read, one row for each input, in order."""
    trainer = make_stock(beta=0.1)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = trainer._generate_and_score_completions(inputs)
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "ref_per_token_logps", "advantages"}
    assert keys <= batch.keys(), f"seam _generate_and_score_completions lost {keys - batch.keys()}"
    tokenizer = trainer.processing_class
    texts = tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    assert texts == [row["prompt"] for row in inputs], "seam _generate_and_score_completions: order changed"


def test_per_token_logps_seam(make_stock: Make) -> None:
    """Seam `_get_per_token_logps_and_entropies`: (B, keep) log-probs of the last tokens."""
    trainer = make_stock(temperature=0.5)
    model = trainer.model.eval()
    ids = torch.tensor([[5, 9, 12, 7], [8, 8, 30, 4]])
    with torch.no_grad():
        logps, entropies, aux = trainer._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), 2, compute_entropy=True
        )
        full = (model(ids).logits[:, :-1] / 0.5).log_softmax(-1)
    expected = full.gather(-1, ids[:, 1:, None])[..., 0][:, -2:]
    assert torch.allclose(logps, expected, atol=1e-5), "seam _get_per_token_logps_and_entropies: other values"
    assert torch.allclose(entropies, -(full.exp() * full).sum(-1)[:, -2:], atol=1e-4)
    assert aux is None


def test_calculate_rewards(make_stock: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seam `_calculate_rewards`: (rows of all processes, functions), NaN for None; one collective, at the end, so that
    a process that failed joins it and then tells. Seams `_pending_metrics`, `_pending_extra_logs`: what functions log
    waits there until the batch is logged, and leaves no trace if they are cleared."""
    trainer = make_stock()
    trainer.model.train()
    gathered: list[torch.Size] = []

    def counted(rewards: torch.Tensor) -> torch.Tensor:
        gathered.append(rewards.shape)
        return rewards

    def reward(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float | None]:
        log_metric("own", 1.0)
        log_extra("column", completions)
        return [None, 0.5, None, 1.0]

    monkeypatch.setattr("trl.trainer.grpo_trainer.gather", counted)
    trainer.reward_funcs = [reward]
    before = {name: list(values) for name, values in trainer._metrics["train"].items()}
    rewards = trainer._calculate_rewards([{"prompt": "a"}] * 4, ["a"] * 4, ["b"] * 4, [[5]] * 4)
    assert rewards.shape == (4, 1), "seam _calculate_rewards: other shape"
    assert rewards[:, 0].isnan().tolist() == [True, False, True, False], "seam _calculate_rewards: None is not NaN"
    assert gathered == [(4, 1)], "seam _calculate_rewards: other collectives"
    assert trainer._pending_metrics["own"] == [1.0], "seam _pending_metrics: metrics wait elsewhere"
    assert trainer._pending_extra_logs["column"] == ["b"] * 4, "seam _pending_extra_logs: columns wait elsewhere"
    after = {name: list(values) for name, values in trainer._metrics["train"].items() if not name.startswith("profil")}
    assert after == before, "seam _calculate_rewards: it logs by itself"


def test_the_step_is_refused_by_taking_its_gradients_away(make_stock: Make) -> None:
    """Seams `_run_epoch`: called once an epoch, its number by keyword, after the loop has set its counters;
    `_get_grad_norm`: asked for before the update, with the loss already in `_tr_loss`; events around it."""
    order: list[str] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            order.append("begin")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            order.append("updated")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            order.append("end")

    trainer = make_stock(max_steps=1, learning_rate=0.1, weight_decay=0.1, logging_nan_inf_filter=False)
    trainer.add_callback(Watch())
    norm_of, run = trainer._get_grad_norm, trainer._run_epoch

    def run_epoch(**kwargs: Any) -> None:
        order.append(f"epoch {kwargs['epoch']}")
        assert trainer._tr_loss.item() == 0, "seam _tr_loss: the running loss is kept elsewhere"
        assert trainer._globalstep_last_logged == 0, "seam _globalstep_last_logged"
        run(**kwargs)

    def refuse(model: Any, grad_norm: Any = None) -> Any:
        norm = norm_of(model, grad_norm)
        order.append("norm")
        assert trainer._tr_loss.item() != 0, "seam _tr_loss: the step's loss is not in it"
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = None
        return norm

    trainer._get_grad_norm, trainer._run_epoch = refuse, run_epoch
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert order == ["epoch 0", "begin", "norm", "updated", "end"], "seam training loop: other order"
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not trainer.optimizer.state_dict()["state"], "seam _get_grad_norm: the optimizer has stepped"


def test_what_generate_reads_at_each_call(make_stock: Make) -> None:
    """Seams `generation_config`: temperature and length of the next completions; `_get_logits_processor` of
    transformers: what it returns is applied to each step's logits, in its order."""
    trainer = make_stock(disable_dropout=True)
    policy, calls = trainer.model, []
    build = policy._get_logits_processor

    def watched(*args: Any, **kwargs: Any) -> Any:
        processors = build(*args, **kwargs)
        processors.append(lambda input_ids, scores: calls.append(input_ids.shape) or scores)
        return processors

    policy._get_logits_processor = watched
    trainer.generation_config.max_new_tokens, trainer.generation_config.temperature = 2, 1e-4
    ids, _ = trainer._generate_single_turn([[5, 6]] * 8, None, {}, 8)
    assert {tuple(row) for row in ids} == {tuple(ids[0])}, "seam generation_config: temperature is not read"
    assert len(ids[0]) <= 2, "seam generation_config: max_new_tokens is not read"
    assert calls == [(8, 2 + step) for step in range(len(ids[0]))], "seam _get_logits_processor: not asked at each step"


# What TRL 1.16 says is removed in 2.0.0, and what its deprecation texts may name besides.
REMOVED_IN_2 = {"use_liger_kernel", "use_transformers_paged", "vllm_importance_sampling_cap"}


def test_trl_names_the_fields_that_it_will_remove() -> None:
    """Whatever a newer TRL deprecates turns up here before it is gone."""
    found = set()
    for cls in GRPOConfig.__mro__:
        if cls.__module__.startswith("trl."):
            source = inspect.getsource(cls).replace("\\`", "`")
            found |= set(re.findall(r"`(\w+)`\s+(?:argument\s+)?is\s+deprecated\s+and\s+will\s+be", source))
    assert found - {"pad_token"} <= REMOVED_IN_2, (
        "TRL deprecates more: take it out of recipes and code, then add it here"
    )
    assert found & REMOVED_IN_2, "the deprecation notices read otherwise now: look for them again"


def test_nothing_uses_a_field_that_trl_2_removes() -> None:
    places = ("rookworld_trl", "recipes", "accelerate_configs", "benchmarks", "notebooks")
    files = [
        file for place in places for file in (ROOT / place).rglob("*") if file.suffix in (".py", ".yaml", ".ipynb")
    ]
    assert len(files) > 100
    uses = re.compile(r"(?:\.|--|\b)({0})\b[\"']?\s*[:=]|\.({0})\b".format("|".join(REMOVED_IN_2)))
    assert uses.search("  use_liger_kernel: true")
    assert uses.search("args.use_transformers_paged)")
    assert not uses.search('("use_transformers_paged", "vllm_importance_sampling_cap"),')
    using = {f"{file.name}: {found[0]}" for file in files if (found := uses.search(file.read_text(encoding="utf-8")))}
    assert not using
