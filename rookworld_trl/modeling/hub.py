"""Pushing a checkpoint to the Hugging Face Hub, with errors that say what to do; the counterpart of `loading`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

# `training_args.bin` is a pickle of the arguments, the Hub token among them; the rest is state of training.
NOT_PUSHED = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*", "checkpoint-*", "_*"]


class PushError(ValueError):
    """A checkpoint could not be pushed; it is still on disk. The message says how to push it again."""


@contextmanager
def explained(repo_id: str, again: str) -> Iterator[None]:
    """Turn what the client raises into a `PushError`.

    Args:
        repo_id: where to.
        again: what to do once the cause is mended.
    """
    try:
        yield
    except RevisionNotFoundError as error:
        raise PushError(f"{repo_id} has no such branch ({error}): set `hub_revision` to one of its branches") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) and not (isinstance(error, RepositoryNotFoundError) and status == 404):
            remedy = "run `hf auth login` with a token that may write there, or set `hub_token`"
        elif isinstance(error, RepositoryNotFoundError):
            remedy = "create the repository first, or check `hub_model_id`"
        elif status >= 500:
            remedy = "the Hub has trouble and was asked several times: wait a little"
        else:
            remedy = "see the Hub's words above"
        raise PushError(f"pushing to {repo_id} failed with status {status} ({error}): {remedy}; {again}") from error
    except (HTTPError, OSError) as error:
        raise PushError(
            f"pushing to {repo_id} failed ({error}): check the network and HF_HUB_OFFLINE; {again}"
        ) from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Trained checkpoint",
) -> str:
    """Upload a checkpoint's files (weights, config, tokenizer, card) in one commit; the repository is made if need be.

    Arguments of training stay here (`NOT_PUSHED`): they hold the token. The client retries 5xx answers and goes on
    where it stopped: large files that the Hub has are not sent again.

    Args:
        folder: of the checkpoint.
        repo_id: `owner/name`.
        token: one that may write; None takes the one saved by `hf auth login`.
        private: of a repository that is made; None: as the owner's settings say.
        revision: a branch, made if need be; None: the main one.

    Returns:
        The commit's address.

    Raises:
        PushError: no right to write, no such repository, no network, or the Hub's own trouble.
    """
    folder = Path(folder)
    api = HfApi(token=token)
    with explained(repo_id, f"the checkpoint is complete in {folder}: `hf upload {repo_id} {folder}`"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
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
