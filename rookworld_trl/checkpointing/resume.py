"""Where a run starts from: nowhere, a checkpoint that was named, or the newest that can be trusted.

--resume_from_checkpoint PATH  exactly there; it must verify
--auto_resume                  the newest that verifies; what does not is set aside; a finished run is a no-op;
                               with no checkpoint at all, the beginning
--recovery_mode                the newest stable checkpoint, at half the learning rate and twice the KL penalty
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from rookworld_trl.checkpointing import store
from rookworld_trl.checkpointing.exits import BAD_INPUT, UNRECOVERABLE
from rookworld_trl.checkpointing.identity import RunIdentity, compare
from rookworld_trl.checkpointing.state import load_tree
from rookworld_trl.files import write_atomically

logger = logging.get_logger(__name__)

RUN_FILE = "run"  # .json in a checkpoint: who wrote it
FINISHED_FILE = "finished.json"  # in the output folder, once everything is done

RECOVERIES_FILE = "recoveries.json"  # beside it: how often each run, by its id, was restarted by `--recovery_mode`

# What `--recovery_mode` does, each time it is given.
RECOVERY_LEARNING_RATE = 0.5
RECOVERY_BETA = 2.0
RECOVERY_KL_TARGET = 0.5


class ResumeError(ValueError):
    """A checkpoint that cannot be resumed from, by these settings or at all; the message names field and remedy."""

    exit_code = BAD_INPUT


class NothingToResumeError(ResumeError):
    """Checkpoints there are, but none that may be trusted: starting anew would throw the run away in silence."""

    exit_code = UNRECOVERABLE


@dataclass(frozen=True)
class Start:
    """Where to start from.

    Attributes:
        checkpoint: None for the beginning.
        finished: there is nothing left to do.
        asked: `max_steps` and `num_train_epochs` as the user gave them.
    """

    checkpoint: Path | None = None
    finished: bool = False
    asked: tuple[float, float] = (-1, 0)


def on_main_process(main: bool, decide: Callable[[], Any]) -> Any:
    """Run `decide` in the main process alone and give its result to all; what it raises is raised in all.

    Raises:
        ValueError, OSError, RuntimeError: by `decide`.
    """
    outcome: list[Any] = [None, None]
    if main:
        try:
            outcome[0] = decide()
        except (ValueError, OSError, RuntimeError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def choose_start(args: Any) -> Start:
    """Read the three flags of `args` (a `RookWorldGRPOConfig`) against what lies in its output folder.

    Sets aside what does not verify, in the main process. Every process must call this.

    Raises:
        ResumeError: the named checkpoint does not verify, or no stable one does.
        NothingToResumeError: `auto_resume`, and none of the checkpoints verifies.
    """
    return on_main_process(args.process_index == 0, lambda: _choose_start(args, Path(args.output_dir)))


def _choose_start(args: Any, output_dir: Path) -> Start:
    asked = (args.max_steps, args.num_train_epochs)
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        check_whole(checkpoint)
        return Start(checkpoint, asked=asked)
    if not (args.auto_resume or args.recovery_mode):
        return Start(asked=asked)
    store.sweep(output_dir)
    if args.recovery_mode:
        stable = store.newest_valid(output_dir, ("stable",))
        if stable is None:
            raise ResumeError(
                f"`recovery_mode` starts from a stable checkpoint, and {output_dir} holds none that verifies. Give "
                "one by `resume_from_checkpoint`, or start anew with other settings"
            )
        return Start(stable, asked=asked)
    if is_finished(output_dir, asked):
        logger.warning(f"{output_dir}: the run is finished; nothing to do. Raise `max_steps` to go on with it")
        return Start(finished=True, asked=asked)
    for folder in store.list_checkpoints(output_dir):
        problems = store.verify(folder, finite=True)
        if not problems:
            return Start(folder, asked=asked)
        store.quarantine(folder, "; ".join(problems))
    quarantined = sorted(path.name for path in output_dir.glob("quarantined-*"))
    if quarantined:
        raise NothingToResumeError(
            f"{output_dir} holds no checkpoint that verifies ({', '.join(quarantined)}: the reasons are in their "
            f"{store.REASON_FILE}). Move them away to start from the beginning"
        )
    return Start(asked=asked)


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


def admit(checkpoint: Path, now: dict[str, Any], recovering: Path | None) -> tuple[RunIdentity, float]:
    """Hold the run that starts against the one that wrote `checkpoint`.

    Args:
        now: fingerprint of the run that starts.
        recovering: the folder whose count of recoveries is to be raised, each of which lowers the learning rate.

    Returns:
        The run's identity, continued, and the factor that the checkpoint's learning rates are to be multiplied by.

    Raises:
        ResumeError: fields that cannot change within a run have changed; the message names each.
    """
    try:
        identity = RunIdentity.from_state(load_tree(checkpoint, RUN_FILE))
    except (TypeError, ValueError) as error:
        raise ResumeError(f"{checkpoint / RUN_FILE}.json: {error}") from error
    changes = compare(identity.fingerprint, now)
    if changes.refused:
        listed = "; ".join(f"`{name}` was {then!r} and is {value!r}" for name, (then, value) in changes.refused.items())
        raise ResumeError(
            f"{checkpoint} belongs to a run with other settings: {listed}. Restore them to go on with that run, or "
            f"start a new one in another `output_dir` with {checkpoint} as its `model`"
        )
    for name, (then, value) in changes.applied.items():
        logger.warning(f"resuming from {checkpoint} with a change: `{name}` was {then!r} and is {value!r} from here on")
    factor = 1.0
    if "learning_rate" in changes.applied:
        then, value = changes.applied["learning_rate"]
        if not then:
            raise ResumeError(
                f"{checkpoint}: `learning_rate` was 0 and is {value!r}: its schedule is all zeros and cannot be "
                f"scaled. Go on at 0, or start a new run in another `output_dir` with {checkpoint} as its `model`"
            )
        factor = value / then
    identity.new_recoveries = 0
    if recovering is not None:
        before, identity.recoveries = identity.recoveries, _count_recovery(recovering, identity)
        identity.new_recoveries = identity.recoveries - before
        factor *= RECOVERY_LEARNING_RATE**identity.new_recoveries
        logger.warning(
            f"recovery {identity.recoveries} from {checkpoint}, which had {before}: for each new one learning rate x "
            f"{RECOVERY_LEARNING_RATE}, KL coefficient x {RECOVERY_BETA}, KL target x {RECOVERY_KL_TARGET}"
        )
    identity.fingerprint = now
    return identity, factor


def _count_recovery(output_dir: Path, identity: RunIdentity) -> int:
    """Number of this recovery of the run. A file counts: the checkpoint started from may be older than the last one."""
    path = output_dir / RECOVERIES_FILE
    counts: dict[str, int] = {}
    try:
        counts = {str(run): int(count) for run, count in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning(f"{path} cannot be read ({error!r}): counting recoveries from the checkpoint's own")
    counts[identity.run_id] = max(identity.recoveries, counts.get(identity.run_id, 0)) + 1
    try:
        write_atomically(path, json.dumps(counts) + "\n")
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}): the next recovery may repeat this one")
    return counts[identity.run_id]


def clear_the_way(output_dir: Path, checkpoint: Path | None) -> None:
    """Clear up, and rename checkpoints that the run starting from `checkpoint` (None: from nothing) leaves behind.

    Later steps of another course of training must not be what the next `auto_resume` finds.
    """
    store.sweep(output_dir)
    (output_dir / FINISHED_FILE).unlink(missing_ok=True)
    after = -1
    if checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve():
        after = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    for folder in store.list_checkpoints(output_dir):
        if store.step_of(folder) > after:
            origin = "the beginning" if checkpoint is None else str(checkpoint)
            store.set_aside(folder, f"a run started again from {origin}", prefix="superseded")


def tighten_kl(controller: Any, beta_max: float, times: int) -> None:
    """Double the coefficient of a `KLController` so many times, within its bounds if it moves by itself."""
    controller.beta *= RECOVERY_BETA**times
    if controller.control != "fixed":
        controller.beta = min(beta_max, controller.beta)


def mark_finished(output_dir: Path, start: Start) -> None:
    """Note that everything, evaluation included, is done; `choose_start` reads it."""
    write_atomically(output_dir / FINISHED_FILE, json.dumps({"asked": start.asked}) + "\n")


def is_finished(output_dir: Path, asked: tuple[float, float]) -> bool:
    """Whether the run came to its end, by `mark_finished`, when it was asked for as much as now."""
    try:
        return tuple(json.loads((output_dir / FINISHED_FILE).read_text(encoding="utf-8"))["asked"]) == asked
    except (OSError, ValueError, KeyError, TypeError):
        return False
