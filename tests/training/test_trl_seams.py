"""What this package leans on inside TRL, pinned. A failure here names the seam an upgrade has moved."""

import inspect
import re
from collections.abc import Callable

from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

Make = Callable[..., GRPOTrainer]

SIGNATURES = {
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate_and_score_completions": "inputs",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_compute_loss": "model inputs",
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
