"""Pushing a checkpoint to the Hugging Face Hub, with errors that say what to do; the counterpart of `loading`."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

PUSHING = ".pushing-"  # begins the name of a checkpoint's copy that is being uploaded
# A pickle of the arguments, the Hub token among them; what `NOT_PUSHED` names besides is state of training.
HOLDS_TOKEN = ["training_args.bin"]
NOT_PUSHED = [*HOLDS_TOKEN, "optimizer.pt", "scheduler.pt", "rng_state*", "checkpoint-*", "_*", "manifest.json"]
# Of a checkpoint on the way; its other files (state of training, manifest) are of use to who resumes only.
PUSHED = [
    *("config.json", "generation_config.json", "model*.safetensors*", "adapter_*"),
    *("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*"),
]


def hide_token(args: Any) -> None:
    """Move `hub_token` from training arguments to the environment, where the client finds it.

    transformers pickles the arguments beside every model that it saves, and people publish those folders.
    """
    if args.hub_token is not None:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


class PushError(ValueError):
    """A checkpoint could not be pushed; it is still on disk. The message says how to push it again."""

    exit_code = 2  # bad input, as `rookworld_trl.checkpointing.stopping` has it: a name, a token, a network


@contextmanager
def explained(repo_id: str, again: str) -> Iterator[None]:
    """Turn what the client raises into a `PushError`.

    Args:
        repo_id: where to.
        again: what to do once the cause is fixed.
    """
    try:
        yield
    except (HTTPError, OSError) as error:
        raise PushError(
            f"pushing to {repo_id} failed ({error}): check `hub_model_id`, `hub_revision`, network and HF_HUB_OFFLINE, "
            f"and that your token may write there (`hf auth login`, or `hub_token`); {again}"
        ) from error


def check_write(repo_id: str, token: str | None = None) -> None:
    """Ask whether the token may write there: to the client, a repository that can be read counts as made.

    Raises:
        HfHubHTTPError: it may not. A Hub that cannot be asked raises nothing.
    """
    try:
        HfApi(token=token).auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise


def push_folder(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Trained checkpoint",
) -> str:
    """Upload a checkpoint's files (weights, config, tokenizer, card) in one commit; the repository is made if need be.

    Arguments of training stay here (`NOT_PUSHED`): they hold the token. The client retries 5xx answers and goes on
    where it stopped: large files that the Hub has are not sent again.

    Args:
        folder: the checkpoint's.
        repo_id: `owner/name`.
        token: one that may write; None takes the one saved by `hf auth login`.
        revision: a branch, made if need be; None: the main one.

    Returns:
        The commit's address.

    Raises:
        PushError: no right to write, no such repository, no network, or the Hub's own trouble.
    """
    folder = Path(folder)
    api = HfApi(token=token)
    with explained(repo_id, f"the checkpoint is complete in {folder}: `hf upload {repo_id} {folder}`"):
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(NOT_PUSHED),
        )
    return str(commit.commit_url)


def push_in_background(
    checkpoint: Path, repo_id: str, token: str | None, revision: str | None, message: str, whole_as: str | None = None
) -> list[Future]:
    """Start uploading a checkpoint's weights, config and tokenizer, and go on.

    The checkpoint may be rotated away meanwhile: what is read is a copy beside it, linked where the disk can, that goes
    when all is done.

    Args:
        checkpoint: folder.
        message: the commits'.
        whole_as: a folder of the repository that gets all of the checkpoint, the optimizer's state included, so that
            training can resume from there; None: no such folder.

    Returns:
        The uploads. A failure is theirs to raise.
    """
    copy = checkpoint.with_name(f"{PUSHING}{checkpoint.name}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, copy_function=_link)
    api = HfApi(token=token)
    common: dict[str, Any] = {"repo_id": repo_id, "folder_path": copy, "revision": revision, "run_as_future": True}
    jobs = [api.upload_folder(commit_message=message, allow_patterns=PUSHED, ignore_patterns=NOT_PUSHED, **common)]
    if whole_as is not None:
        message += ", checkpoint"
        jobs.append(
            api.upload_folder(commit_message=message, path_in_repo=whole_as, ignore_patterns=HOLDS_TOKEN, **common)
        )

    def tidy(_: object) -> None:
        if all(job.done() for job in jobs):
            shutil.rmtree(copy, ignore_errors=True)

    for job in jobs:
        job.add_done_callback(tidy)
    return jobs


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
