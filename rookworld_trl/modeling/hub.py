"""Pushing a checkpoint to the Hugging Face Hub, with errors that say what to do; the counterpart of `loading`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

# A pickle of the arguments, the Hub token among them; what `NOT_PUSHED` names besides is state of training.
NOT_PUSHED = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*", "checkpoint-*", "_*", "manifest.json"]


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
            commit_message="Trained checkpoint",
            ignore_patterns=list(NOT_PUSHED),
        )
    return str(commit.commit_url)
