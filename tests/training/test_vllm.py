"""vLLM as the sampler, with a stand-in for TRL's `VLLMGeneration`; `make test-vllm` runs the engine itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GPT2LMHeadModel
from trl.generation.vllm_generation import VLLMGeneration

from rookworld_trl.modeling.rollout import rollout
from rookworld_trl.training import GateError, RookWorldGRPOTrainer

Make = Callable[..., RookWorldGRPOTrainer]


class Engine:
    """Samples from a copy of the policy's weights that only `sync_weights` refreshes, as vLLM does."""

    error = 0.0  # what its log-probs are off by
    runs: list["Engine"]

    def __init__(self, model: Any, processing_class: Any, **settings: Any):
        self.policy, self.settings = model, settings
        self.eos = processing_class.eos_token_id
        folder = Path(model.name_or_path)
        self.started_from = sorted(path.name for path in folder.iterdir())
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.weight_names = set(file.keys())
        self.model = GPT2LMHeadModel.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == self.eos
        self.autocast: list[bool] = []
        self.syncs = self.shutdowns = 0
        self.llm = self.llm_engine = self.engine_core = self.vllm_client = self
        self.runs.append(self)

    def sync_weights(self) -> None:
        self.model.load_state_dict(self.policy.state_dict())
        self.syncs += 1

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def shutdown(self) -> None:
        self.shutdowns += 1

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any) -> tuple:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        length = self.settings["max_completion_length"]
        result = rollout(self.model, prompts, max_new_tokens=length, eos_token_id=self.eos, seed=len(self.autocast))
        logps = [[[logp + self.error] for logp in row] for row in result.logps]
        return prompts, result.completion_ids, logps, None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    kind = type("Engine", (Engine,), {"runs": []})
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", kind)
    monkeypatch.setattr("rookworld_trl.training.preparation.is_vllm_available", lambda: True)
    return kind


def test_the_stand_in_looks_like_trls_own() -> None:
    for name in ("sync_weights", "generate"):
        assert hasattr(VLLMGeneration, name), f"TRL seam VLLMGeneration.{name} is gone"
    source = Path(VLLMGeneration._init_vllm.__code__.co_filename).read_text(encoding="utf-8")
    assert "self.llm = LLM(\n                model=model.name_or_path," in source, (
        "TRL seam: where vLLM's weights come from"
    )


def test_vllm_samples_with_the_newest_weights(make_trainer: Make, engine: type[Engine]) -> None:
    trainer = make_trainer(
        rollout_backend="vllm", vllm_mode="colocate", bf16=True, learning_rate=1e-2, max_steps=3, beta=0.0
    )
    assert trainer.args.use_vllm
    assert trainer.sampler.backend == "vllm"
    trainer.train()
    (run,) = engine.runs
    assert run.syncs == 3
    assert run.autocast == [False] * 3, "vLLM has a dtype of its own"
    differences = [row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history[:-1]]
    assert max(differences) < 0.03
    trainer.close()
    assert run.shutdowns == 1


def test_the_engine_starts_from_the_weights_in_memory(make_trainer: Make, engine: type[Engine]) -> None:
    trainer = make_trainer(rollout_backend="vllm", vllm_mode="colocate", bf16=True, beta=0.0)
    (run,) = engine.runs
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(run.started_from)
    assert "transformer.wte.weight" in run.weight_names
    assert "lm_head.weight" not in run.weight_names, "vLLM would keep the head apart from the embeddings"
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, run.model.state_dict()[name]), name
    assert "weights-" not in trainer.model.name_or_path + trainer.model.config._name_or_path


def test_a_server_in_float32_is_held_to_float32(make_trainer: Make, engine: type[Engine], tmp_path: Path) -> None:
    settings = {"rollout_backend": "vllm", "vllm_mode": "server", "max_steps": 1, "beta": 0.0}
    folder = tmp_path / "served"
    plain = make_trainer()
    plain.model.save_pretrained(folder)
    plain.processing_class.save_pretrained(folder)
    policy = GPT2LMHeadModel.from_pretrained(folder)
    trainer = make_trainer(_model=policy, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["gates/sampler"] < 1e-4
    engine.error = 1e-3
    with pytest.raises(GateError, match=r"gate 'sampler' FAILS: measured 0\.001"):
        make_trainer(_model=policy, **settings).train()


def test_vllm_that_is_not_there_is_named(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rookworld_trl.training.preparation.is_vllm_available", lambda: False)
    with pytest.raises(ValueError, match=r"`use_vllm` is True: vLLM is not installed. Install it with `pip install"):
        make_trainer(rollout_backend="vllm", vllm_mode="server")
