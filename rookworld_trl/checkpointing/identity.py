"""What makes a run this run: an id, a start, and a fingerprint that a resumed run is held against, field by field.

A changed field is one of three things. Free: it does not touch what is learned (`logging_steps`, `output_dir`).
Applied: it takes effect from the resumed step on, and that is logged (`learning_rate`, `max_steps`). Everything else
is refused: the result would be neither the old run nor a new one. A name (`model`, `dataset`) may change as long as
what it stands for does not.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import torch
from datasets import Dataset

# Patterns of argument names.
FREE = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "resume_from_checkpoint", "auto_resume"),
    *("recovery_mode", "logging_*", "log_*", "save_*", "eval_*", "do_*", "hub_*", "push_to_hub*", "trackio*", "ddp_*"),
    *("dataloader_*", "health_bands", "peak_tflops", "local_rank", "stable_*", "debug_*", "skip_memory_metrics"),
    *(
        "include_*",
        "num_proc",
        "num_completions_to_print",
        "restore_callback_states_from_checkpoint",
        "enable_jit_checkpoint",
    ),
    *("engine_workers", "engine_cache", "expected_parameters", "quiet", "json"),
)
APPLIED = (
    "max_train_minutes",
    *("learning_rate", "max_steps", "num_train_epochs", "kl_stop_threshold", "kl_target", "kl_factor"),
    *("kl_interval", "beta_min", "beta_max", "max_grad_norm", "recovery", "recovery_*"),
    *("gradient_checkpointing*", "activation_checkpointing*"),
    # These round differently, no more.
    *(
        "ref_device",
        "attn_implementation",
        "torch_compile*",
        "pad_to_multiple_of",
        "vllm_*",
        "share_prefixes",
    ),
)
# What a value was called in earlier checkpoints.
RENAMED = {"kl_type": {"reverse": "policy_to_reference", "forward": "reference_to_policy"}}
# Fields that say where something comes from, by the digest that says what it is.
BY_CONTENT = {
    "train_dataset": ("dataset", "dataset_split", "streaming", "max_rows", "best_move", "illegal", "engine_nodes"),
    "starting_weights": ("model", "model_revision", "model_commit"),
}


@dataclass
class RunIdentity:
    """Who the run is; travels with every checkpoint.

    Attributes:
        run_id: the same for the run's whole life, restarts included.
        started: first start, UTC, ISO 8601.
        run_name: the tracker's name for it.
        recoveries: how often `--recovery_mode` restarted it.
        new_recoveries: how many of these the checkpoint that this start went on from did not know of.
        fingerprint: all that decides what the run computes, as JSON values: arguments, processes, `facts`.
    """

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    run_name: str | None = None
    recoveries: int = 0
    new_recoveries: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside the block, Weights & Biases draws one curve for the whole run, unless the user has named another."""
        names = {"WANDB_RUN_ID": self.run_id, "WANDB_RESUME": "allow"}
        ours = {name: value for name, value in names.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RunIdentity":
        return cls(**state)


def settings(args: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments and a recipe's own fields as JSON values: as they come back from a file, without tuples.

    Without `alert`, whose address or command may hold a secret.
    """
    chosen = {name: value for name, value in {**recipe, **args.to_dict()}.items() if name != "alert"}
    return json.loads(json.dumps(chosen, default=str))


def dataset_digests(dataset: Any, ordered: bool) -> dict[str, str] | None:
    """SHA-256 of a dataset's rows in their order, by how many rows; None for a stream, which cannot be read twice.

    Args:
        ordered: the rows are trained on as they stand. Then the first 1, 2, 4, 8, ... rows have digests too: a run that
            is to take more steps has more rows, and is the same run if it begins with the same ones.
    """
    if not isinstance(dataset, Dataset):
        return None
    digest, digests = hashlib.sha256(), {}
    number = 0
    # By value: the bytes of Arrow buffers differ between a file and a selection of its rows.
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            digest.update(json.dumps(row, default=str).encode())
            number += 1
            if number == len(dataset) or (ordered and number.bit_count() == 1):
                digests[str(number)] = digest.hexdigest()[:16]
    return digests


def _same_start(then: Any, now: Any) -> bool:
    """Whether two `dataset_digests` are of rows of which the one begins with (at least half of) the other."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return False
    common = then.keys() & now.keys()
    return bool(common) and then[(most := max(common, key=int))] == now[most]


def _same_content(field: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    then, value = before.get(field), now.get(field)
    return _same_start(then, value) if field == "train_dataset" else bool(value) and then == value


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """SHA-256 of all that decides which tokens a text has; None for a tokenizer that cannot be written as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    state |= {"padding": None, "truncation": None, "special": tokenizer.special_tokens_map}  # the two are of a call
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Changes:
    """Fields that differ between a checkpoint and the run that resumes from it, as name: (then, now).

    Attributes:
        applied: those that may change within a run.
        conflicts: those that may not.
    """

    applied: dict[str, tuple[Any, Any]]
    conflicts: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        """The conflicts, for a message."""
        return "; ".join(f"`{name}` was {then!r} and is {now!r}" for name, (then, now) in self.conflicts.items())


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Sort changed fields; fields that only one side knows come from another version and are applied."""
    applied: dict[str, tuple[Any, Any]] = {}
    conflicts: dict[str, tuple[Any, Any]] = {}
    for name in sorted(before.keys() | now.keys()):
        then, value = before.get(name), now.get(name)
        then = RENAMED[name].get(str(then), then) if name in RENAMED else then
        if then == value or any(fnmatchcase(name, pattern) for pattern in FREE):
            continue
        if name == "train_dataset" and _same_start(then, value):
            continue
        if any(name in names and _same_content(content, before, now) for content, names in BY_CONTENT.items()):
            continue
        known = name in before and name in now
        accepted = not known or any(fnmatchcase(name, pattern) for pattern in APPLIED)
        (applied if accepted else conflicts)[name] = (then, value)
    return Changes(applied, conflicts)
