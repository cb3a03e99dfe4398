"""Where a run starts from (nowhere, a checkpoint that was named, or the newest that can be trusted), and as which run.

--resume_from_checkpoint PATH  exactly there; it must verify
--auto_resume                  the newest that verifies; the beginning, where there is none; a finished run is a no-op
--recovery_mode                the newest but one that verifies, at half the learning rate and twice the KL penalty

A resumed run is the run that wrote the checkpoint if rows, starting weights, tokenizer, rewards and the shape of its
batches are the same. Settings may change: what is another is logged, and takes effect from the resumed step on.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging

from rookworld_trl import ranks
from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.stopping import BAD_INPUT
from rookworld_trl.checkpointing.store import load_tree
from rookworld_trl.files import write_atomically

logger = logging.get_logger(__name__)

RUN_FILE = "run"  # .json in a checkpoint: who wrote it
FINISHED_FILE = "finished.json"  # in the output folder, once everything is done
RECOVERY_LEARNING_RATE = 0.5  # what `--recovery_mode` multiplies the learning rate by
# How much is asked for: a finished run that is asked for more, or less, goes on.
AMOUNTS = ("max_steps", "num_train_epochs", "max_train_minutes")

# How a program is started, which is no part of what it computes; `alert` may hold a secret.
HOW_STARTED = (
    *("alert", "auto_resume", "dry_run", "from_run", "json", "output_dir", "quiet", "recovery_mode"),
    *("resume_from_checkpoint", "run_name"),
)


class ResumeError(ValueError):
    """A checkpoint that cannot be resumed from, by these settings or at all; the message names field and remedy."""

    exit_code = BAD_INPUT


# Who a run is


@dataclass
class RunIdentity:
    """Who the run is; travels with every checkpoint.

    Attributes:
        run_id: the same for the run's whole life, restarts included.
        started: first start, UTC, ISO 8601.
        run_name: the tracker's name for it.
        fingerprint: all that decides what the run computes, as JSON values: arguments, processes, `facts`.
    """

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    run_name: str | None = None
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


def compare(before: Mapping[str, Any], now: Mapping[str, Any], facts: Iterable[str] = ()) -> tuple[Changes, Changes]:
    """Changed fields that may change within a run, and those that may not: `facts` that both sides know."""
    changes = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
    changes = {name: (then, value) for name, (then, value) in changes.items() if then != value}
    then, fresh = changes.get("train_dataset", (None, None))
    if isinstance(then, dict) and isinstance(fresh, dict) and (common := then.keys() & fresh.keys()):
        most = max(common, key=int)  # the one begins with the other, or with half of it at least
        if then[most] == fresh[most]:
            del changes["train_dataset"]
    conflicts = {name: changes.pop(name) for name in list(changes) if name in facts and name in before and name in now}
    return changes, conflicts


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

    Every process must call this.

    Args:
        recipe: settings that are none of `args`.

    Raises:
        ResumeError: the named checkpoint does not verify, or none that could be taken does.
    """
    asked = settings(args, recipe or {})
    return Start(
        *ranks.decided(args.process_index == 0, partial(_choose_start, args, Path(args.output_dir), asked)), asked
    )


def _choose_start(args: Any, output_dir: Path, asked: Mapping[str, Any]) -> tuple[Path | None, bool]:
    """The checkpoint, and whether there is nothing left to do."""
    if args.resume_from_checkpoint:
        check_whole(Path(args.resume_from_checkpoint))
        return Path(args.resume_from_checkpoint), False
    if not (args.auto_resume or args.recovery_mode):
        return None, False
    if not args.recovery_mode and is_finished(output_dir, asked):
        return None, True
    number, folders = int(args.recovery_mode), store.list_checkpoints(output_dir)
    for folder in folders:
        if problems := store.verify(folder):
            logger.warning(f"{folder} is not resumed from: {'; '.join(problems)}")
        elif number:
            number -= 1
        else:
            return folder, False
    if args.recovery_mode:
        raise ResumeError(
            f"`recovery_mode` starts from the newest checkpoint but one, and {output_dir} holds no two that verify. "
            "Give one by `resume_from_checkpoint`, or start again with other settings"
        )
    if folders:  # starting again would throw the run away in silence
        raise ResumeError(
            f"{output_dir} holds no checkpoint that verifies ({', '.join(each.name for each in folders)}: see the "
            "lines above). Move them away to start from the beginning"
        )
    return None, False


def check_whole(checkpoint: Path) -> None:
    """Raises:
    ResumeError: the folder is missing or does not verify.
    """
    if not checkpoint.is_dir():
        raise ResumeError(f"{checkpoint}: there is no such folder; give `resume_from_checkpoint` a checkpoint")
    if problems := store.verify(checkpoint):
        newest = store.newest_valid(checkpoint.parent)
        remedy = f"resume from {newest}, which verifies" if newest else "no other checkpoint beside it verifies"
        raise ResumeError(f"{checkpoint} cannot be resumed from: {'; '.join(problems)}. Remedy: {remedy}")


def compared(checkpoint: Path, now: Mapping[str, Any], facts: Iterable[str]) -> tuple[RunIdentity, Changes]:
    """Hold the run that starts, by its fingerprint, against the one that wrote `checkpoint`. Changes nothing.

    Returns:
        The run's identity then, and what is another now.

    Raises:
        ResumeError: some of the `facts` have changed; the message names each.
    """
    kept, names = load_tree(checkpoint, RUN_FILE), {each.name for each in fields(RunIdentity)}
    identity = RunIdentity(**{name: value for name, value in kept.items() if name in names})
    changes, conflicts = compare(identity.fingerprint, now, facts)
    if conflicts:
        raise ResumeError(
            f"{checkpoint} belongs to a run of another kind: {spelled(conflicts)}. Restore them to go on with that "
            f"run, or start a new one in another `output_dir` with {checkpoint} as its `model`"
        )
    return identity, changes


def clear_the_way(output_dir: Path, checkpoint: Path | None) -> None:
    """Clear up, and rename checkpoints that the run starting from `checkpoint` (None: from nothing) leaves behind.

    Later steps of another course of training must not be what the next `auto_resume` finds.
    """
    store.sweep(output_dir)
    (output_dir / FINISHED_FILE).unlink(missing_ok=True)
    after = -1
    if checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve():
        after = store.step_of(checkpoint)
    for folder in store.list_checkpoints(output_dir):
        if store.step_of(folder) > after:
            number = len(list(output_dir.glob(f"superseded*-{folder.name}")))
            target = folder.with_name(f"superseded{number or ''}-{folder.name}")
            os.rename(folder, target)
            origin = "the beginning" if checkpoint is None else str(checkpoint)
            logger.warning(
                f"{folder} is now {target.name}: a run started again from {origin}. Delete what you don't need"
            )


def scale_learning_rate(optimizer: Any, scheduler: Any, ratio: float) -> None:
    """Multiply the rate in force and those that the schedule is going to set."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * ratio
    # A group's own rate is overwritten at the next step; the schedule is computed from `base_lrs`.
    inner = getattr(scheduler, "scheduler", scheduler)
    for name in ("base_lrs", "_last_lr"):
        if hasattr(inner, name):
            setattr(inner, name, [rate * ratio for rate in getattr(inner, name)])


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


def mark_finished(output_dir: Path, start: Start) -> None:
    """Note that everything, evaluation included, is done; `choose_start` reads it."""
    write_atomically(output_dir / FINISHED_FILE, json.dumps({"asked": start.asked}) + "\n")


def is_finished(output_dir: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the run came to its end (`mark_finished`), when it was asked for as much as now."""
    try:
        then = dict(json.loads((output_dir / FINISHED_FILE).read_text(encoding="utf-8"))["asked"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if any(then.get(name) != asked.get(name) for name in AMOUNTS):
        return False
    logger.warning(
        f"{output_dir}: the run is finished; nothing to do, whatever else has changed "
        f"({spelled(compare(then, asked)[0])}). "
        "Raise `max_steps` to go on with it, or give a new run another `output_dir`"
    )
    return True
