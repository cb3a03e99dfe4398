"""Where a run starts from (nowhere, a checkpoint that was named, or the newest that can be trusted), and as which run.

--resume_from_checkpoint PATH  exactly there; it must verify
--auto_resume                  the newest that verifies; what does not is set aside; a finished run is a no-op;
                               with no checkpoint at all, the beginning
--recovery_mode                the newest stable checkpoint, at half the learning rate and twice the KL penalty

A resumed run is the run that wrote the checkpoint if this package's own settings, and the digests of data, weights,
tokenizer and rewards, are the same; those that say where something comes from may change as long as that stays what it
is. Any other difference is logged, and takes effect from the resumed step on.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import GRPOConfig, SFTConfig

from rookworld_trl import ranks
from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.state import load_tree
from rookworld_trl.checkpointing.stopping import BAD_INPUT, UNRECOVERABLE
from rookworld_trl.files import write_atomically

logger = logging.get_logger(__name__)

RUN_FILE = "run"  # .json in a checkpoint: who wrote it
FINISHED_FILE = "finished.json"  # in the output folder, once everything is done
RECOVERIES_FILE = "recoveries.json"  # beside it: how often each run, by its id, was restarted by `--recovery_mode`
# What `--recovery_mode` does to the learning rate, each time it is given.
RECOVERY_LEARNING_RATE = 0.5
# How much is asked for: a finished run that is asked for more, or less, goes on.
AMOUNTS = ("max_steps", "num_train_epochs", "max_train_minutes")

# How a program is started, which is no part of what it computes; `alert` may hold a secret.
HOW_STARTED = (
    *("alert", "auto_resume", "dry_run", "from_run", "json", "output_dir", "quiet", "recovery_mode"),
    *("resume_from_checkpoint", "run_name"),
)
# Settings of our own that may change within a run: they measure, bound or place, or round differently, no more.
MAY_CHANGE = (
    *("attn_implementation", "beta_max", "beta_min", "engine_cache", "eval_*", "expected_parameters"),
    *("health_*", "kl_factor", "kl_interval", "kl_stop_threshold", "kl_target", "max_train_minutes"),
    *(
        "recovery",
        "recovery_*",
        "ref_device",
        "share_prefixes",
        "stable_*",
        "target_every",
        "throughput",
    ),
)
UPSTREAM = {each.name for config in (GRPOConfig, SFTConfig) for each in fields(config)}
# Fields that say where something comes from, by the digest that says what it is.
BY_CONTENT = {
    "train_dataset": ("dataset", "dataset_split", "streaming", "max_rows", "best_move", "illegal", "engine_nodes"),
    "starting_weights": ("model", "model_revision", "model_commit"),
}


class ResumeError(ValueError):
    """A checkpoint that cannot be resumed from, by these settings or at all; the message names field and remedy."""

    exit_code = BAD_INPUT


class NothingToResumeError(ResumeError):
    """Checkpoints there are, but none that may be trusted: starting again would throw the run away in silence."""

    exit_code = UNRECOVERABLE


# Who a run is


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


def settings(args: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments and a recipe's own fields as JSON values: as they come back from a file, without tuples."""
    chosen = {name: value for name, value in {**recipe, **args.to_dict()}.items() if name not in HOW_STARTED}
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


Changes = dict[str, tuple[Any, Any]]  # fields that differ, by name: then and now


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Changes, Changes]:
    """Changed fields that may change within a run, and those that may not.

    Those that only one side knows come from another version, and may.
    """
    applied: Changes = {}
    conflicts: Changes = {}
    for name in sorted(before.keys() | now.keys()):
        then, value = before.get(name), now.get(name)
        same = then == value or (name == "train_dataset" and _same_start(then, value))
        if same or any(name in names and _same_content(each, before, now) for each, names in BY_CONTENT.items()):
            continue
        decides = name in before and name in now and name not in UPSTREAM
        decides = decides and not any(fnmatchcase(name, pattern) for pattern in MAY_CHANGE)
        (conflicts if decides else applied)[name] = (then, value)
    return applied, conflicts


def spelled(fields: Changes) -> str:
    """Changed fields, for a message."""
    return "; ".join(f"`{name}` was {then!r} and is {now!r}" for name, (then, now) in fields.items()) or "nothing"


# Where it starts


@dataclass(frozen=True)
class Start:
    """Where to start from.

    Attributes:
        checkpoint: None for the beginning.
        finished: there is nothing left to do.
        asked: all settings as the user gave them.
    """

    checkpoint: Path | None = None
    finished: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)


def choose_start(args: Any, recipe: Mapping[str, Any] | None = None) -> Start:
    """Read the three flags of `args` (a `RookWorldGRPOConfig`) against what lies in its output folder.

    Sets aside what does not verify, in the main process. Every process must call this.

    Args:
        recipe: settings that are none of `args`.

    Raises:
        ResumeError: the named checkpoint does not verify, or no stable one does; or the run in the folder is finished
            and had other settings.
        NothingToResumeError: `auto_resume`, and none of the checkpoints verifies.
    """
    asked = settings(args, recipe or {})
    return Start(
        *ranks.decided(args.process_index == 0, partial(_choose_start, args, Path(args.output_dir), asked)), asked
    )


def _choose_start(args: Any, output_dir: Path, asked: Mapping[str, Any]) -> tuple[Path | None, bool]:
    """The checkpoint, and whether there is nothing left to do."""
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        check_whole(checkpoint)
        return checkpoint, False
    if not (args.auto_resume or args.recovery_mode):
        return None, False
    store.sweep(output_dir)
    if args.recovery_mode:
        stable = store.newest_valid(output_dir, ("stable",))
        if stable is None:
            raise ResumeError(
                f"`recovery_mode` starts from a stable checkpoint, and {output_dir} holds none that verifies. Give "
                "one by `resume_from_checkpoint`, or start again with other settings"
            )
        return stable, False
    if is_finished(output_dir, asked):
        return None, True
    for folder in store.list_checkpoints(output_dir):
        problems = store.verify(folder, finite=True)
        if not problems:
            return folder, False
        store.set_aside(folder, "; ".join(problems))
    quarantined = sorted(path.name for path in output_dir.glob("quarantined-*"))
    if quarantined:
        raise NothingToResumeError(
            f"{output_dir} holds no checkpoint that verifies ({', '.join(quarantined)}: the reasons are in their "
            f"{store.REASON_FILE}). Move them away to start from the beginning"
        )
    return None, False


def check_whole(checkpoint: Path) -> None:
    """Raises:
    ResumeError: the folder is missing or does not verify.
    """
    if not checkpoint.is_dir():
        raise ResumeError(f"{checkpoint}: there is no such folder; give `resume_from_checkpoint` a checkpoint")
    problems = store.verify(checkpoint, finite=True)
    if problems:
        newest = store.newest_valid(checkpoint.parent)
        remedy = f"resume from {newest}, which verifies" if newest else "no other checkpoint beside it verifies"
        raise ResumeError(f"{checkpoint} cannot be resumed from: {'; '.join(problems)}. Remedy: {remedy}")


def compared(checkpoint: Path, now: Mapping[str, Any]) -> tuple[RunIdentity, Changes]:
    """Hold the run that starts, by its fingerprint, against the one that wrote `checkpoint`. Changes nothing.

    Returns:
        The run's identity then, and what is another now.

    Raises:
        ResumeError: fields that cannot change within a run have changed; the message names each.
    """
    try:
        identity = RunIdentity(**load_tree(checkpoint, RUN_FILE))
    except (TypeError, ValueError) as error:
        raise ResumeError(f"{checkpoint / RUN_FILE}.json: {error}") from error
    changes, conflicts = compare(identity.fingerprint, now)
    if changes.get("learning_rate", (1.0,))[0] == 0:  # its schedule is all zeros and cannot be scaled
        conflicts["learning_rate"] = changes.pop("learning_rate")
    if conflicts:
        raise ResumeError(
            f"{checkpoint} belongs to a run with other settings: {spelled(conflicts)}. Restore them to go on "
            f"with that run, or start a new one in another `output_dir` with {checkpoint} as its `model`"
        )
    return identity, changes


def admit(checkpoint: Path, now: dict[str, Any], recovering: Path | None) -> tuple[RunIdentity, float]:
    """`compared`, and what is to be done about the changes.

    Args:
        now: fingerprint of the run that starts.
        recovering: the folder whose count of recoveries is to be raised, each of which lowers the learning rate.

    Returns:
        The run's identity, continued, and the factor that the checkpoint's learning rates are to be multiplied by.

    Raises:
        ResumeError: see `compared`.
    """
    identity, changes = compared(checkpoint, now)
    if changes:
        logger.warning(f"resuming from {checkpoint} with other settings from here on: {spelled(changes)}")
    then, value = changes.get("learning_rate", (1.0, 1.0))
    factor = value / then
    identity.new_recoveries = 0
    if recovering is not None:  # a file counts: the checkpoint started from may be older than the last recovery
        counts, before = counts_in(recovering / RECOVERIES_FILE), identity.recoveries
        identity.recoveries = max(before, counts.get(identity.run_id, 0)) + 1
        keep_counts(recovering / RECOVERIES_FILE, counts | {identity.run_id: identity.recoveries})
        identity.new_recoveries = identity.recoveries - before
        factor *= RECOVERY_LEARNING_RATE**identity.new_recoveries
        logger.warning(
            f"recovery {identity.recoveries} from {checkpoint}, which had {before}: learning rate x "
            f"{RECOVERY_LEARNING_RATE} for each new one"
        )
    identity.fingerprint = now
    return identity, factor


def counts_in(path: Path) -> dict[str, int]:
    """What `keep_counts` wrote; nothing if there is no such file, or, with a warning, none that can be read."""
    try:
        return {name: int(count) for name, count in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        logger.warning(f"{path} cannot be read ({error!r}): counting from 0")
        return {}


def keep_counts(path: Path, counts: Mapping[str, int]) -> None:
    """Write whole numbers by name; where the disk doesn't allow it, say so: the counts are kept in memory alone."""
    try:
        write_atomically(path, json.dumps(counts) + "\n")
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}): make room or fix its permissions; training goes on")


def clear_the_way(output_dir: Path, checkpoint: Path | None) -> None:
    """Clear up, and rename checkpoints that the run starting from `checkpoint` (None: from nothing) leaves behind.

    Later steps of another course of training must not be what the next `auto_resume` finds.
    """
    store.sweep(output_dir)
    (output_dir / FINISHED_FILE).unlink(missing_ok=True)
    after = -1
    if checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve():
        after = trainer_state(checkpoint)["global_step"]
    for folder in store.list_checkpoints(output_dir):
        if store.step_of(folder) > after:
            origin = "the beginning" if checkpoint is None else str(checkpoint)
            store.set_aside(folder, f"a run started again from {origin}", prefix="superseded")


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What transformers keeps beside weights and optimizer: steps done, steps planned, the log."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def scale_learning_rate(optimizer: Any, scheduler: Any, ratio: float) -> None:
    """Multiply the rate in force and those that the schedule is going to set."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * ratio
    _scale_schedule(getattr(scheduler, "scheduler", scheduler), ratio)


def _scale_schedule(scheduler: Any, ratio: float) -> None:
    """A group's own rate is overwritten at the next step; the schedule is computed from `base_lrs`."""
    for name in ("base_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * ratio for rate in getattr(scheduler, name)])
    for part in getattr(scheduler, "_schedulers", ()):
        _scale_schedule(part, ratio)


def lay_schedule_anew(optimizer: Any, scheduler: Any) -> None:
    """Put into force what a schedule says of the coming step that was made for another number of steps than it had.

    The rates of a checkpoint are those of its own schedule: at the end of a run mostly 0.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if isinstance(inner, LambdaLR):  # as all are that follow a curve; others go by what is measured
        each = zip(inner.base_lrs, inner.lr_lambdas, strict=True)
        inner._last_lr = [rate * factor(inner.last_epoch) for rate, factor in each]
        for group, rate in zip(optimizer.param_groups, inner._last_lr, strict=True):
            group["lr"] = rate


def mark_finished(output_dir: Path, start: Start, model: Path) -> None:
    """Note that everything, evaluation included, is done; `choose_start` reads it.

    Args:
        model: the folder of the trained model, in `output_dir` or that itself.
    """
    files = sorted(path for path in model.iterdir() if path.name.startswith(store.MODEL_FILES) and path.is_file())
    note = {"asked": start.asked, "files": store.described(output_dir, files)}
    write_atomically(output_dir / FINISHED_FILE, json.dumps(note) + "\n")


def is_finished(output_dir: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the run came to its end (`mark_finished`), when it was asked for as much as now, with its model whole.

    Raises:
        ResumeError: the run that came to its end had other settings.
    """
    try:
        note = json.loads((output_dir / FINISHED_FILE).read_text(encoding="utf-8"))
        then, problems = dict(note["asked"]), store.damage(output_dir, note["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    changes, conflicts = compare(then, asked)
    if conflicts:
        raise ResumeError(
            f"{output_dir} holds a finished run with other settings: {spelled(conflicts)}. Give this one "
            "another `output_dir`, or restore them"
        )
    if problems:
        logger.warning(
            f"{output_dir} holds a finished run, but of its model {'; '.join(problems)}: going on from the newest "
            "checkpoint, or the beginning"
        )
    if problems or any(then.get(name) != asked.get(name) for name in AMOUNTS):
        return False
    logger.warning(
        f"{output_dir}: the run is finished; nothing to do, whatever else has changed ({spelled(changes)}). "
        "Raise `max_steps` to go on with it, by the schedule of a run of so many steps; another `learning_rate` counts "
        "from there on"
    )
    return True
